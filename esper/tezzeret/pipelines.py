"""The three pipelines, and which one a piece of work gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.artifact import Pipeline

HIGH_INTEREST = 0.7

# The wrapper only calls kernels; most of the compile time goes into it and its optimisation
# buys nothing measurable. Line tables serve a debugger that will not be there.
_COMMON: dict[str, Any] = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel: Inductor options on top of the pipeline's."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a pipeline does. With several variants each is built and timed, the best kept."""

    options: Mapping[str, Any]
    variants: tuple[Variant, ...] = (Variant("default"),)
    deadline_seconds: float = 120.0


RECIPES: Mapping[Pipeline, Recipe] = {
    # Vectorised and fused as Inductor does it, with the cheapest wrapper.
    Pipeline.FAST: Recipe({**_COMMON, "aot_inductor.compile_wrapper_opt_level": "O0"}),
    # Fused multiply-add, small intermediates on the stack, and an optimised wrapper.
    Pipeline.STANDARD: Recipe(
        {**_COMMON, "aot_inductor.compile_wrapper_opt_level": "O2",
         "cpp.enable_floating_point_contract_flag": "fast"},
        deadline_seconds=180.0,
    ),
    # STANDARD in several variants: half-width vectors (wide ones can lower the clock, and are
    # wasted on narrow sites), and matrix products from templates with fused epilogues.
    Pipeline.AGGRESSIVE: Recipe(
        {**_COMMON, "aot_inductor.compile_wrapper_opt_level": "O2",
         "cpp.enable_floating_point_contract_flag": "fast"},
        variants=(
            Variant("wide vectors"),
            Variant("256-bit vectors", {"cpp.simdlen": 256}),
            Variant("templated products",
                    {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}),
        ),
        deadline_seconds=600.0,
    ),
}


def choose_pipeline(interest: float, load: float) -> Pipeline:
    """The pipeline for new work. `load` is the share of the queue's limit that waits, 0 to 1.

    Interest above 0.7 is AGGRESSIVE below a load of 0.3, else STANDARD; other work is STANDARD
    below 0.5, else FAST.
    """
    if interest > HIGH_INTEREST:
        return Pipeline.AGGRESSIVE if load < 0.3 else Pipeline.STANDARD
    return Pipeline.STANDARD if load < 0.5 else Pipeline.FAST
