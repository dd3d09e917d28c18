"""The forge: a process that has torch and Inductor imported, and forks once per blueprint.

It reads one request per line on standard input and answers with one line on standard
output, both JSON; the artifact itself goes into the request's folder. A fork costs
milliseconds where an import costs seconds. The forge itself never compiles, so that no
state is carried from one blueprint to the next. Run by `worker.Forge`, as
`python -m esper.tezzeret.forge OWNER_PID`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from esper.leyline.artifact import (
    BACKWARD,
    FORWARD,
    Manifest,
    ParameterSpec,
    Pipeline,
    kernel_id,
)
from esper.leyline.blueprint import BlueprintIR, parse_blueprint
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature
from esper.tezzeret.backends import Built
from esper.tezzeret.pack import pack
from esper.tezzeret.pipelines import Recipe

ARTIFACT = "kernel.esper"
_LIMITS = {  # of a compile; generous, they are there for what has gone wild
    resource.RLIMIT_CPU: 900,  # seconds
    resource.RLIMIT_FSIZE: 1 << 30,
    resource.RLIMIT_DATA: 12 << 30,
    resource.RLIMIT_CORE: 0,
}
_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)


def in_child(work: Callable[[], None], log: Path) -> Callable[[], str]:
    """Fork and run `work` there; returns a function that waits and gives the error, or ""."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _die_with_parent(parent)
            work()
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)

    def wait() -> str:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return ""
        if log.exists():
            return log.read_text()
        return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"

    return wait


def _keep_maps_symbolic() -> None:
    """Let the backward of a convolution be called for any height and width.

    Inductor's lowering of it compares strides as concrete numbers, in search of a layout for
    its GPU templates, and thereby pins the map's size to that of the example. On a CPU it
    ends in ATen's own operator in any case, so it is sent there directly.
    """
    import torch
    from torch._inductor.lowering import fallback_handler, lowerings

    operator = torch.ops.aten.convolution_backward.default
    lowerings[operator] = fallback_handler(operator, add_to_fallback_set=False)


def _find_vector_instructions() -> None:
    """Let Inductor find out, once for all forks, which vector instructions work here.

    It compiles and loads a test program per instruction set, six of them in about 8 s, and
    remembers the answers in the process that asked. Asked in a fork, with that blueprint's
    empty cache, it would do so for every blueprint anew.
    """
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    valid_vec_isa_list()


def _export_only_the_interface() -> None:
    """Let a kernel's libraries show the functions that AOTInductor's runner asks for, no more.

    g++ marks inline variables as unique in the process, and glibc never unmaps a library that
    defines such a symbol: a closed kernel would stay in memory. And the names of all that Inductor
    includes were two thirds of the file.
    """
    from torch._inductor import cpp_builder

    builder: Any = cpp_builder  # what its functions are given differs from one torch to the next
    if not builder.is_gcc():  # clang has no unique symbols, and no such flag
        return
    flags = builder._get_shared_cflags
    builder._get_shared_cflags = lambda *given: [
        *flags(*given), "fvisibility=hidden", "fvisibility-inlines-hidden", "fno-gnu-unique"
    ]


def _library(half: Any, options: dict[str, Any], target: Path) -> None:
    """Compile one half to a shared library at `target`; runs in a child of its own."""
    import torch

    with contextlib.redirect_stdout(sys.stderr):
        program = half.export()
        made = torch._inductor.aot_compile(
            program.module(check_guards=False), program.example_inputs[0], options=options
        )
    if not isinstance(made, str):
        raise TypeError(f"expected the path of a shared library, Inductor gave {made!r}")
    # Symbols that only a debugger reads are a third of the file, and opening reads it all.
    if (strip := shutil.which("strip")) is not None:
        subprocess.run([strip, "--strip-unneeded", made], check=True, timeout=60)
    os.replace(made, target)


def _build(lowered: Any, options: dict[str, Any], folder: Path) -> str:
    """Both halves of one variant, at the same time; the error or ""."""
    folder.mkdir()
    waits = [
        in_child(partial(_library, half, options, folder / f"{name}.so"), folder / f"{name}.log")
        for name, half in (("forward", lowered.forward), ("backward", lowered.backward))
    ]
    return "\n".join(filter(None, [wait() for wait in waits]))


def _time(lowered: Any, folder: Path) -> None:
    """Write the median time of forward plus backward at the hinted sizes; in a child."""
    import torch

    runner = torch._C._aoti.AOTIModelContainerRunnerCpu
    forward, backward = (runner(str(folder / f"{n}.so"), 1) for n in ("forward", "backward"))
    inputs = [torch.randn_like(t) if t.is_floating_point() else t
              for t in lowered.forward.examples]
    inputs[1] = torch.tensor(1.0)  # alpha
    given = [torch.randn_like(t) if t.is_floating_point() else t
             for t in lowered.backward.examples]
    samples = []
    for _ in range(60):
        start = time.perf_counter()
        for _ in range(10):
            forward.run(inputs)
            backward.run(given)
        samples.append(time.perf_counter() - start)
    (folder / "seconds").write_text(repr(statistics.median(samples[10:])))


def _fastest(lowered: Any, folders: dict[str, Path]) -> Path:
    """Time every variant in a fresh child each, and return the folder of the best."""
    times: dict[str, float] = {}
    for name, folder in folders.items():
        if not in_child(partial(_time, lowered, folder), folder / "timing.log")():
            times[name] = float((folder / "seconds").read_text())
    if not times:
        raise RuntimeError("no variant could be run")
    return folders[min(times, key=lambda name: times[name])]


def build_libraries(
    ir: BlueprintIR, signature: SiteSignature, recipe: Recipe, folder: Path
) -> Built:
    """Lower a blueprint and compile both halves by Inductor."""
    from esper.tezzeret.lower import lower

    lowered = lower(ir, signature)
    built: dict[str, Path] = {}
    errors: list[str] = []
    for index, variant in enumerate(recipe.variants):
        place = folder / f"variant{index}"
        error = _build(lowered, {**recipe.options, **variant.options}, place)
        if error:
            errors.append(f"variant {variant.name!r}: {error}")
        else:
            built[variant.name] = place
    if not built:
        raise RuntimeError("\n".join(errors))
    best = next(iter(built.values())) if len(built) == 1 else _fastest(lowered, built)
    return Built(lowered.backward_inputs, lowered.gradients,
                 {name: (best / name).read_bytes() for name in (FORWARD, BACKWARD)})


def compile_here(
    ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
) -> None:
    """Compile a blueprint and write its artifact into `folder`."""
    from esper.tezzeret.workshop import backend_for

    started = time.perf_counter()
    backend = backend_for(ir, signature)
    built = backend.build(ir, signature, pipeline, folder)
    inferred = infer(ir, signature)
    tools = backend.toolchain()
    manifest = Manifest(
        kernel_id=kernel_id(ir.id, signature, tools, pipeline), blueprint_id=ir.id,
        signature=signature, pipeline=pipeline, toolchain=tools,
        parameters=tuple(ParameterSpec(name=p.name, shape=p.shape) for p in inferred.parameters),
        backward_inputs=built.backward_inputs, gradients=built.gradients, sha256={},
        compile_seconds=time.perf_counter() - started, flops=inferred.flops,
    )
    (folder / ARTIFACT).write_bytes(pack(manifest, ir, built.code))


def _answer(request: dict[str, Any]) -> dict[str, str]:
    folder = Path(request["folder"])

    def work() -> None:
        for limit, value in _LIMITS.items():
            _, hard = resource.getrlimit(limit)
            cap = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (cap, hard))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None  # forget the forge's own
        compile_here(
            parse_blueprint(request["blueprint"]),
            SiteSignature.model_validate_json(request["signature"]),
            Pipeline(request["pipeline"]), folder,
        )

    return {"error": in_child(work, folder / "error.log")()}


def main() -> None:
    _die_with_parent(int(sys.argv[1]))
    # What compilers and libraries print must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    import torch._inductor.compile_fx

    import esper.tezzeret.lower  # noqa: F401

    torch.set_num_threads(1)
    _keep_maps_symbolic()
    _export_only_the_interface()
    _find_vector_instructions()
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
