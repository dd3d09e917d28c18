"""The closed set of operations, and the node that uses one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import gcd
from typing import Literal

from pydantic import Field, model_validator

from esper.errors import BlueprintError
from esper.leyline.base import Contract
from esper.leyline.signature import SiteKind

INPUT = "h"  # the name of a blueprint's input
EPS = 1e-5  # of a normalisation that does not say otherwise


class Op(StrEnum):
    """The closed set. Adding one means: shapes, reference, analysis, tests, IR_VERSION."""

    LINEAR = "linear"  # over the channel axis, whatever the layout (1x1 convolution on maps)
    CONV = "conv"  # dense 2-d convolution, stride 1, same padding
    DEPTHWISE = "depthwise"  # per channel; 2-d on maps, 1-d on tokens (left-padded if causal)
    LAYER_NORM = "layer_norm"  # over the channel axis at each position
    RMS_NORM = "rms_norm"  # over the channel axis at each position
    GROUP_NORM = "group_norm"  # over groups of channels and all positions
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    ADD = "add"
    MUL = "mul"
    SCALE = "scale"  # a learnable factor per channel
    MEAN_POOL = "mean_pool"  # over all positions, keeping the axes with extent 1
    ATTENTION = "attention"  # scaled dot product of inputs q, k, v; causal where the site is


class Init(StrEnum):
    """How a node's weight starts: as torch's own layers do, at zero, or at one (scale)."""

    DEFAULT = "default"
    ZERO = "zero"


class Width(Contract):
    """A channel count: floor(C * times / over) + plus, at least 1. Always in lowest terms."""

    times: int = Field(default=0, ge=0, le=64)
    over: int = Field(default=1, ge=1, le=4096)
    plus: int = Field(default=0, ge=0, le=65536)

    @model_validator(mode="before")
    @classmethod
    def _lowest_terms(cls, data: object) -> object:
        if isinstance(data, Mapping):
            t, o = data.get("times", 0), data.get("over", 1)
            if isinstance(t, int) and isinstance(o, int) and o > 0 and t >= 0:
                g = gcd(t, o)
                return {**data, "times": t // g, "over": o // g}
        return data

    def at(self, channels: int) -> int:
        return max(1, channels * self.times // self.over + self.plus)

    def __str__(self) -> str:
        c = f"{'' if self.times == 1 else self.times}C{'' if self.over == 1 else f'/{self.over}'}"
        parts = ([c] if self.times else []) + ([str(self.plus)] if self.plus else [])
        return "+".join(parts) or "1"


C = Width(times=1)


@dataclass(frozen=True)
class OpSpec:
    """How many inputs an op takes and which of the optional fields it needs."""

    arity: int
    needs: frozenset[str] = frozenset()
    allows: frozenset[str] = frozenset()
    kinds: frozenset[SiteKind] = frozenset(SiteKind)
    parametric: bool = False
    commutative: bool = False


_MAPS, _SPACE = frozenset({SiteKind.MAP}), frozenset({SiteKind.MAP, SiteKind.TOKENS})
_UNARY = OpSpec(1)

SPECS: Mapping[Op, OpSpec] = {
    Op.LINEAR: OpSpec(1, frozenset({"out"}), frozenset({"bias", "init"}), parametric=True),
    Op.CONV: OpSpec(
        1, frozenset({"out", "kernel"}), frozenset({"bias", "init"}), _MAPS, parametric=True
    ),
    Op.DEPTHWISE: OpSpec(
        1, frozenset({"kernel"}), frozenset({"bias", "init"}), _SPACE, parametric=True
    ),
    Op.LAYER_NORM: OpSpec(1, allows=frozenset({"eps"}), parametric=True),
    Op.RMS_NORM: OpSpec(1, allows=frozenset({"eps"}), parametric=True),
    Op.GROUP_NORM: OpSpec(
        1, frozenset({"groups"}), frozenset({"eps"}), _MAPS, parametric=True
    ),
    Op.RELU: _UNARY,
    Op.GELU: _UNARY,
    Op.SILU: _UNARY,
    Op.TANH: _UNARY,
    Op.SIGMOID: _UNARY,
    Op.ADD: OpSpec(2, commutative=True),
    Op.MUL: OpSpec(2, commutative=True),
    Op.SCALE: OpSpec(1, allows=frozenset({"init"}), parametric=True),
    Op.MEAN_POOL: OpSpec(1, kinds=_SPACE),
    Op.ATTENTION: OpSpec(3, frozenset({"heads"}), kinds=frozenset({SiteKind.TOKENS})),
}


class Node(Contract):
    """One operation. Fields that its op does not use must be left out.

    `bias` (default true for the ops that have one) and `init` concern the node's own
    parameters; `kernel` is odd; `groups` and `heads` must divide the channels they split; `eps`
    is a normalisation's, `EPS` where left out.
    """

    id: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    op: Op
    inputs: tuple[str, ...]
    out: Width | None = None
    kernel: Literal[1, 3, 5, 7] | None = None
    groups: int | None = Field(default=None, ge=1, le=4096)
    heads: int | None = Field(default=None, ge=1, le=256)
    bias: bool | None = None
    init: Init | None = None
    eps: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits_its_op(self) -> Node:
        spec = SPECS[self.op]
        if len(self.inputs) != spec.arity:
            raise BlueprintError(
                f"{self.op} takes {spec.arity} inputs, got {len(self.inputs)}", self.id
            )
        given = {f for f in ("out", "kernel", "groups", "heads", "bias", "init", "eps")
                 if getattr(self, f) is not None}
        if missing := spec.needs - given:
            raise BlueprintError(f"{self.op} needs {sorted(missing)}", self.id)
        if extra := given - spec.needs - spec.allows:
            raise BlueprintError(f"{self.op} does not take {sorted(extra)}", self.id)
        return self

    @property
    def has_bias(self) -> bool:
        return "bias" in SPECS[self.op].allows and self.bias is not False

    @property
    def epsilon(self) -> float:
        """What a normalisation adds to the variance."""
        return EPS if self.eps is None else self.eps

    @property
    def zero_at_birth(self) -> bool:
        """All parameters of this node start at zero, so its output does too."""
        return self.init is Init.ZERO
