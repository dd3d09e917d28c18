"""BlueprintIR: a small graph over a closed set of operations.

A blueprint describes one sub-network f with output shaped as its input `h`. Widths are
written in terms of the site's channels C; batch and space are symbolic. Nodes are listed
with inputs before users; the last word is `output`. Shapes and costs are worked out in
`shapes`, the canonical form and id in `canonical`, the meaning in `reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import gcd
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from esper.errors import BlueprintError
from esper.leyline.base import Contract
from esper.leyline.signature import SiteKind

INPUT = "h"
IR_VERSION = 1  # BlueprintIR.version
MAX_NODES = 64
MAX_JSON_BYTES = 64 * 1024


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
    Op.LAYER_NORM: OpSpec(1, parametric=True),
    Op.RMS_NORM: OpSpec(1, parametric=True),
    Op.GROUP_NORM: OpSpec(1, frozenset({"groups"}), kinds=_MAPS, parametric=True),
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
    parameters; `kernel` is odd; `groups` and `heads` must divide the channels they split.
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

    @model_validator(mode="after")
    def _fits_its_op(self) -> Node:
        spec = SPECS[self.op]
        if len(self.inputs) != spec.arity:
            raise ValueError(
                f"node {self.id!r}: {self.op} takes {spec.arity} inputs, got {len(self.inputs)}"
            )
        given = {f for f in ("out", "kernel", "groups", "heads", "bias", "init")
                 if getattr(self, f) is not None}
        if missing := spec.needs - given:
            raise ValueError(f"node {self.id!r}: {self.op} needs {sorted(missing)}")
        if extra := given - spec.needs - spec.allows:
            raise ValueError(f"node {self.id!r}: {self.op} does not take {sorted(extra)}")
        return self

    @property
    def has_bias(self) -> bool:
        return "bias" in SPECS[self.op].allows and self.bias is not False

    @property
    def zero_at_birth(self) -> bool:
        """All parameters of this node start at zero, so its output does too."""
        return self.init is Init.ZERO


class BlueprintIR(Contract):
    """A graph for one kind of site. Structure is checked here, shapes in `shapes.infer`.

    Raises (through pydantic): ValueError naming the node for an unknown op or input, a
    forward or repeated id, a node that does not reach the output, or too many nodes.
    """

    version: Literal[1] = 1
    kind: SiteKind
    name: str = Field(default="", max_length=80)  # for people; not part of the meaning
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=MAX_NODES)
    output: str

    @model_validator(mode="after")
    def _well_formed(self) -> BlueprintIR:
        seen = {INPUT}
        for node in self.nodes:
            if node.id in seen:
                raise ValueError(f"node {node.id!r}: the id is taken; ids must be unique")
            for source in node.inputs:
                if source not in seen:
                    raise ValueError(
                        f"node {node.id!r}: input {source!r} is not {INPUT!r} and not listed before"
                    )
            if self.kind not in SPECS[node.op].kinds:
                raise ValueError(f"node {node.id!r}: {node.op} is not defined on {self.kind} sites")
            seen.add(node.id)
        if self.output not in seen:
            raise ValueError(f"output {self.output!r} is not a node")
        live = {self.output}
        for node in reversed(self.nodes):
            if node.id not in live:
                raise ValueError(f"node {node.id!r}: does not reach the output; leave it out")
            live.update(node.inputs)
        return self

    @property
    def id(self) -> str:
        """Content id of the canonical form: equal for isomorphic spellings, name left out."""
        from esper.leyline.canonical import blueprint_id

        return blueprint_id(self)

    def node(self, node_id: str) -> Node:
        return next(n for n in self.nodes if n.id == node_id)

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True)


def parse_blueprint(text: str | bytes) -> BlueprintIR:
    """Read a blueprint's JSON form; the size is capped before anything is parsed.

    Raises:
        BlueprintError: too large, not JSON, of another version, or malformed.
    """
    if len(text) > MAX_JSON_BYTES:
        raise BlueprintError(
            f"a blueprint's JSON has at most {MAX_JSON_BYTES} bytes, this one {len(text)}"
        )
    try:
        return BlueprintIR.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise BlueprintError(f"{first['msg']}{f' (at {where})' if where else ''}") from e
