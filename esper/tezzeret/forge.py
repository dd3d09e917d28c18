"""The forge: a process that has torch and Inductor imported, and forks once per blueprint.

It reads one request per line on standard input and answers with one line on standard
output, both JSON; the artifact itself goes into the request's folder. A fork costs
milliseconds where an import costs seconds. The forge itself never compiles, so that no
state is carried from one blueprint to the next: it happens in a child that has shut itself in
(`esper.sandbox`) and has a folder of its own. Run by `worker.Forge`, as
`python -m esper.tezzeret.forge OWNER_PID`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, kernel_id
from esper.leyline.blueprint import BlueprintIR, parse_blueprint
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature
from esper.sandbox.allowance import Allowance
from esper.sandbox.layers import Layer, enter
from esper.sandbox.probe import available
from esper.tezzeret.children import die_with_parent, in_children
from esper.tezzeret.pack import pack
from esper.tezzeret.workshop import backend_for

ARTIFACT = "kernel.esper"


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


def compile_here(
    ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
) -> None:
    """Compile a blueprint and write its artifact into `folder`."""
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
