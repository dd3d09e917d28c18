"""The three pipelines, and which one a piece of work gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, Op
from esper.leyline.library import HIGH_INTEREST

# Line tables and frame pointers serve a debugger that will not be there.
_COMMON: dict[str, Any] = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}


def never(ir: BlueprintIR) -> bool:
    return False


def by_rule(ir: BlueprintIR) -> bool:
    """Whether spelling the convolutions of `ir` out pays as a rule (see `convolutions`).

    Beside a dense convolution, which stays a call, it does not: oneDNN passes its own layout on
    along a chain of calls.
    """
    return all(node.op is not Op.CONV for node in ir.nodes)


def against_the_rule(ir: BlueprintIR) -> bool:
    return not by_rule(ir)


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel: whether its convolutions are spelled out, and Inductor
    options on top of the pipeline's."""

    name: str
    spells_out: Callable[[BlueprintIR], bool]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What a pipeline does. With several variants each that comes to other code is built, and
    timed at several sizes; the first is kept unless another is clearly faster."""

    options: Mapping[str, Any]
    variants: tuple[Variant, ...]
    deadline_seconds: float


_BETTER: dict[str, Any] = {
    **_COMMON, "aot_inductor.compile_wrapper_opt_level": "O2",
    "cpp.enable_floating_point_contract_flag": "fast",
}
RECIPES: Mapping[Pipeline, Recipe] = {
    # Vectorised and fused as Inductor does it; convolutions stay calls. Most of the time goes into
    # the wrapper, which calls the loops and is not optimised here.
    Pipeline.FAST: Recipe(
        {**_COMMON, "aot_inductor.compile_wrapper_opt_level": "O0"},
        (Variant("plain", never),), deadline_seconds=120.0,
    ),
    # Convolutions spelled out where that pays as a rule, multiply-add fused, an optimised wrapper.
    Pipeline.STANDARD: Recipe(
        _BETTER, (Variant("plain", by_rule),), deadline_seconds=180.0,
    ),
    # Measured instead of by rule: convolutions the other way, and half-width vectors (wide ones
    # can lower the clock, and are wasted on narrow sites).
    Pipeline.AGGRESSIVE: Recipe(
        _BETTER,
        (Variant("plain", by_rule),
         Variant("the other convolutions", against_the_rule),
         Variant("256-bit vectors", by_rule, {"cpp.simdlen": 256})),
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
