"""Triton's kernels as cubins: compiled for a GPU that need not be here, checked, and packed.

Runs in a child of the forge. What is compiled, and how it is launched, is in `programs`.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from esper.errors import CompileError
from esper.leyline.artifact import CUBINS, PLAN, Pipeline, Toolchain
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.cubin import read_cubin
from esper.leyline.launch import ALIGNMENT, SHARED_LIMITS, CubinKernel, Plan, check_cubins
from esper.leyline.signature import SiteSignature
from esper.tezzeret.backends import Built
from esper.tezzeret.programs import Form, match, program

_INSTALL = "install a CUDA build of torch, which Triton comes with"


@functools.cache
def compilers() -> str:
    """Triton and the assembler that it brings, with their versions."""
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError as e:
        raise CompileError(f"Triton is not here ({e}): {_INSTALL}") from e
    try:
        said = subprocess.run([get_ptxas(90).path, "--version"], capture_output=True, text=True,
                              check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError, RuntimeError) as e:
        raise CompileError(f"Triton's ptxas does not say its version ({e}): {_INSTALL}") from e
    version = re.search(r"V\d+(\.\d+)*", said)
    return f"triton {triton.__version__}, ptxas {version[0] if version else 'unknown'}"


class TritonTemplates:
    """Cubins of Triton's templates for one arch, "sm_80" or "sm_90". Needs no GPU."""

    name = "triton templates"

    def __init__(self, arch: str) -> None:
        if arch not in SHARED_LIMITS:
            raise CompileError(
                f"Triton's templates are compiled for {', '.join(SHARED_LIMITS)}, given {arch}"
            )
        self.arch = arch

    def why_not(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        if signature.device != "cuda":
            return f"Triton's templates are for cuda, the site is on {signature.device}"
        try:
            match(ir, signature)
        except CompileError as e:
            return str(e)
        return ""

    def toolchain(self) -> Toolchain:
        import torch

        from esper.version import __version__

        return Toolchain(torch=str(torch.__version__), isa=self.arch, compiler=compilers(),
                         esper=__version__)

    def build(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
    ) -> Built:
        what = program(ir, signature, pipeline)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        kernels: list[CubinKernel] = []
        cubins = b""
        for form in what.forms:
            code, shared = compile_form(form, self.arch)
            kernels.append(_described(form, code, shared, len(cubins)))
            cubins += code
        plan = Plan(arch=self.arch, kernels=tuple(kernels), forward=what.forward,
                    backward=what.backward)
        check_cubins(plan, cubins)
        return Built(what.backward_inputs, what.gradients,
                     {PLAN: plan.model_dump_json().encode(), CUBINS: cubins})


def function_of(form: Form) -> Any:
    """The function of `esper.triton_kernels` that `form` is made of."""
    module, _, name = form.function.partition(".")
    return getattr(importlib.import_module(f"esper.triton_kernels.{module}"), name)


def compile_form(form: Form, arch: str) -> tuple[bytes, int]:
    """The cubin of `form`, and the dynamic shared memory in bytes that it wants.

    Raises:
        CompileError: it needs memory of the device's beside its arguments, which plans do not
            provide.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.compilation.disable_line_info = True  # source paths of this machine, and a larger file
    function, constants = function_of(form), dict(form.constants)
    names = [n for n in function.arg_names if n not in constants]
    signature = dict.fromkeys(function.arg_names, "constexpr")
    signature |= dict(zip(names, form.types, strict=True))
    attributes = {
        (function.arg_names.index(n),): [["tt.divisibility", ALIGNMENT]]
        for n, aligned in zip(names, form.aligned, strict=True) if aligned
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": form.warps, "num_stages": form.stages},
    )
    scratch = made.metadata.global_scratch_size + made.metadata.profile_scratch_size
    if scratch or made.metadata.num_ctas != 1 or made.metadata.num_warps != form.warps:
        raise CompileError(
            f"{form.function} wants {scratch} bytes of scratch memory, {made.metadata.num_ctas} "
            f"blocks in a cluster and {made.metadata.num_warps} warps; a launch plan has no "
            f"scratch memory, no clusters, and {form.warps} warps"
        )
    return made.asm["cubin"], int(made.metadata.shared)


def _described(form: Form, code: bytes, shared: int, offset: int) -> CubinKernel:
    found = read_cubin(code)
    return CubinKernel(
        name=found.name, offset=offset, bytes=len(code), parameters=form.types,
        hidden=len(found.parameters) - len(form.types), warps=found.threads // 32,  # type: ignore[arg-type]
        shared=shared, registers=found.registers, stack=found.stack,
    )
