"""The forge: a process that has torch and Inductor imported, and forks once per blueprint.

It reads one request per line on standard input and answers with one line on standard
output, both JSON; the artifact itself goes into the request's folder. A fork costs
milliseconds where an import costs seconds. The forge itself never compiles, so that no
state is carried from one blueprint to the next: it happens in a child that has shut itself in
(`esper.sandbox`) and has a folder of its own. Run by `worker.Forge`, as
`python -m esper.tezzeret.forge OWNER_PID`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import EsperError
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
from esper.sandbox.allowance import Allowance, in_force
from esper.sandbox.layers import Layer, enter
from esper.sandbox.probe import available
from esper.tezzeret.backends import Built
from esper.tezzeret.children import NothingBuilt, die_with_parent, in_children
from esper.tezzeret.pack import pack
from esper.tezzeret.pipelines import Recipe

if TYPE_CHECKING:  # torch is imported when the forge is warmed, not by those who start one
    from esper.tezzeret.contest import Build

ARTIFACT = "kernel.esper"
CLEARLY = 0.97  # of the first variant's time; less is within the noise of so short a comparison


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
    return in_children({
        name: partial(_library, half, options, folder / f"{name}.so")
        for name, half in (("forward", lowered.forward), ("backward", lowered.backward))
    }, folder, in_force())


def _fastest(signature: SiteSignature, builds: list[Build]) -> Build:
    """The first, or another that is clearly faster; each is compared in a fresh child."""
    best, least = builds[0], CLEARLY
    for build in builds[1:]:
        result = build.folder / "ratio"

        def work(build: Build = build, result: Path = result) -> None:
            from esper.tezzeret.contest import ratio

            result.write_text(repr(ratio(signature, builds[0], build)))

        if error := in_children({"timing": work}, build.folder, in_force()):
            _say(f"{build.name}: not to be timed: {error.strip().splitlines()[0]}")
            continue
        found = float(result.read_text())
        _say(f"{build.name}: {found:.3f} times the time of {builds[0].name}")
        if found < least:
            best, least = build, found
    return best


def _say(words: str) -> None:
    print(f"forge: {words}", file=sys.stderr, flush=True)


def _builds(
    ir: BlueprintIR, signature: SiteSignature, recipe: Recipe, folder: Path
) -> list[Build]:
    """Every variant of a recipe that can be built; those that come to the same code once.

    Raises:
        NothingBuilt: there is none, with what went wrong in each.
    """
    from esper.tezzeret.contest import Build
    from esper.tezzeret.lower import lower

    builds: list[Build] = []
    errors: list[str] = []
    seen: set[str] = set()
    for index, variant in enumerate(recipe.variants):
        place = folder / f"variant{index}"
        options = {**recipe.options, **variant.options}
        try:
            lowered = lower(ir, signature, spelled_out=variant.spells_out(ir))
        except EsperError as e:
            errors.append(f"variant {variant.name!r}: {e}")
            continue
        code = repr((lowered.code, sorted(options.items())))
        if code in seen:
            continue
        seen.add(code)
        if error := _build(lowered, options, place):
            errors.append(f"variant {variant.name!r}: {error}" if len(recipe.variants) > 1
                          else error)
        else:
            builds.append(Build(variant.name, lowered, place))
    if not builds:
        raise NothingBuilt("\n".join(errors))
    return builds


def build_libraries(
    ir: BlueprintIR, signature: SiteSignature, recipe: Recipe, folder: Path
) -> Built:
    """Lower a blueprint and compile both halves by Inductor; of a recipe's variants the fastest."""
    best = _fastest(signature, _builds(ir, signature, recipe, folder))
    return Built(best.lowered.backward_inputs, best.lowered.gradients,
                 {name: (best.folder / name).read_bytes() for name in (FORWARD, BACKWARD)})


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


def _answer(request: dict[str, Any], layers: tuple[Layer, ...]) -> dict[str, str]:
    folder, shared = Path(request["folder"]), Path(os.environ["TMPDIR"])
    allowance = Allowance(**request["allowance"])

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the next requests are not a compiler's
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache" / "triton")
        os.environ["CCACHE_DISABLE"] = "1"  # its folder is read-only, and nothing comes twice
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None  # forget the forge's own
        enter(layers, allowance, [folder, shared])
        compile_here(
            parse_blueprint(request["blueprint"]),
            SiteSignature.model_validate_json(request["signature"]),
            Pipeline(request["pipeline"]), folder,
        )

    return {"error": in_children({"compile": work}, folder, allowance)}


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    # What compilers and libraries print must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    found = available()
    layers = tuple(layer for layer, why in found.items() if not why)
    import torch
    import torch._inductor.compile_fx

    import esper.tezzeret.lower  # noqa: F401

    torch.set_num_threads(1)
    # A forked child makes torch's thread pool anew when it is first asked for. Where two of
    # autograd's threads are the first, at once, one of them finds none and aborts the process.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
    _keep_maps_symbolic()
    _export_only_the_interface()
    _find_vector_instructions()
    answers.write(json.dumps({"layers": found}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line), layers)) + "\n")


if __name__ == "__main__":
    main()
