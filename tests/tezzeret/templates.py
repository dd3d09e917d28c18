"""Blueprints that Triton's templates compute, in their variations."""

from __future__ import annotations

from esper.leyline.blueprint import INPUT, BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.signature import SiteKind


def low_rank(kind: SiteKind, rank: int = 4, bias: bool = False) -> BlueprintIR:
    return BlueprintIR(
        kind=kind, name=f"low rank {rank}",
        nodes=(
            Node(id="down", op=Op.LINEAR, inputs=(INPUT,), out=Width(plus=rank), bias=False),
            Node(id="up", op=Op.LINEAR, inputs=("down",), out=C, bias=bias, init=Init.ZERO),
            Node(id="sum", op=Op.ADD, inputs=(INPUT, "up")),
        ),
        output="sum",
    )


def gated(
    kind: SiteKind, norm: bool = True, bias: bool = False, width: int | None = None
) -> BlueprintIR:
    out, x = C if width is None else Width(plus=width), "norm" if norm else INPUT
    head = (Node(id="norm", op=Op.RMS_NORM, inputs=(INPUT,), eps=1e-4),) if norm else ()
    return BlueprintIR(
        kind=kind, name=f"gated{' norm' if norm else ''}",
        nodes=(
            *head,
            # Not in the order in which the kernel takes them.
            Node(id="up", op=Op.LINEAR, inputs=(x,), out=out, bias=bias),
            Node(id="gate", op=Op.LINEAR, inputs=(x,), out=out, bias=bias),
            Node(id="silu", op=Op.SILU, inputs=("gate",)),
            Node(id="mul", op=Op.MUL, inputs=("up", "silu")),
            Node(id="down", op=Op.LINEAR, inputs=("mul",), out=C, init=Init.ZERO),
            Node(id="sum", op=Op.ADD, inputs=("down", INPUT)),
        ),
        output="sum",
    )
