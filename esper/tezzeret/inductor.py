"""Inductor ahead of time: two shared libraries that torch's own runner opens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.leyline.artifact import Pipeline, Toolchain
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.tezzeret.backends import Built
from esper.tezzeret.cubins import compilers
from esper.tezzeret.libraries import build_libraries
from esper.tezzeret.pipelines import RECIPES, Recipe, Variant, never
from esper.tezzeret.toolchain import toolchain

# The kernels belong into the library: an artifact has no folder of cubins beside it.
_CUDA: dict[str, Any] = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.embed_kernel_binary": True,
}
# What is tried and timed, Inductor tries and times itself, on the GPU. None of this has ever run.
_PLAIN = (Variant("plain", never),)
CUDA_RECIPES: Mapping[Pipeline, Recipe] = {
    Pipeline.FAST: Recipe(
        {**_CUDA, "aot_inductor.compile_wrapper_opt_level": "O0"}, _PLAIN, deadline_seconds=120.0,
    ),
    Pipeline.STANDARD: Recipe(
        {**_CUDA, "aot_inductor.compile_wrapper_opt_level": "O2"}, _PLAIN, deadline_seconds=180.0,
    ),
    Pipeline.AGGRESSIVE: Recipe(
        {**_CUDA, "aot_inductor.compile_wrapper_opt_level": "O2", "max_autotune": True,
         "max_autotune_gemm_backends": "TRITON,ATEN", "coordinate_descent_tuning": True},
        _PLAIN, deadline_seconds=600.0,
    ),
}


@functools.cache
def gpu_arch() -> str | None:
    """The arch of this machine's GPU, "sm_90" say; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


class InductorCpu:
    """Any blueprint, for this machine's own instruction set."""

    name = "inductor"

    def why_not(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        return "" if signature.device == "cpu" else f"it compiles for cpu, not {signature.device}"

    def toolchain(self) -> Toolchain:
        return toolchain()

    def build(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
    ) -> Built:
        return build_libraries(ir, signature, RECIPES[pipeline], folder)


class InductorCuda:
    """Any blueprint, for this machine's GPU. Without one there is no way: autograd asks for the
    device when the gradients are traced, Inductor for its properties when it lowers them. Has
    never run."""

    name = "inductor for cuda"

    def why_not(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        if signature.device != "cuda":
            return f"it compiles for cuda, not {signature.device}"
        if gpu_arch() is None:
            return "there is no GPU here, which tracing the gradients and Inductor both ask for"
        return ""

    def toolchain(self) -> Toolchain:
        here = toolchain()
        return here.model_copy(update={
            "isa": gpu_arch() or "none", "compiler": f"{here.compiler}, {compilers()}"})

    def build(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
    ) -> Built:
        return build_libraries(ir, signature, CUDA_RECIPES[pipeline], folder)
