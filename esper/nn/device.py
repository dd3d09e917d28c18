"""Kernels for CUDA devices: Triton's, for the two graphs that have one.

None of this has run on a GPU yet: that the right function is given the right tensors is
tested, with plain torch in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import INPUT, BlueprintIR, Node, Op
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind
from esper.nn.trace import Match
from esper.nn.values import NoMatch

_PACKAGE = "esper.triton_kernels"


def device_kernel(found: Match) -> tuple[Kernel, str]:
    """The Triton kernel that computes `found` on CUDA, and its name.

    Raises:
        NoMatch: there is none, or Triton is not installed.
    """
    ir = found.ir
    parts = _gated_mlp(ir)
    name = "gated_mlp" if parts else "low_rank"
    residual = False
    if not parts:
        residual, parts = _low_rank(ir)
    if found.signature.device != "cuda" or not parts:
        raise NoMatch(f"there is no kernel for it on {found.signature.device}: compiled ones are "
                      "for cpu, Triton's for a gated MLP and a low-rank map on cuda")
    if found.signature.kind is SiteKind.MAP:
        raise NoMatch("its channels come before its pixels, Triton's kernels have channels last")
    if name == "low_rank" and ir.node(parts[0]).has_bias:
        raise NoMatch("its inner layer has a bias, Triton's low-rank map has none there")
    if found.signature.dtype == "float64":
        raise NoMatch("it is float64, Triton's kernels are for float32, bfloat16 and float16")
    function = _function(name)
    order = {p.name: i for i, p in enumerate(infer(ir, found.signature).parameters)}
    wanted = [order.get(f"{node}.{leaf}") for node in parts for leaf in ("weight", "bias")]
    if name == "low_rank":
        del wanted[1]

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        out = function(h, *(None if i is None else params[i] for i in wanted))
        return h + out if residual else out

    return kernel, f"Triton's {name}"


def _function(name: str) -> Callable[..., Tensor]:
    try:
        function: Callable[..., Tensor] = getattr(import_module(f"{_PACKAGE}.{name}"), name)
    except (ImportError, AttributeError) as e:
        raise NoMatch(f"Triton, or its {name}, is not installed: {e}") from e
    return function


def _of(ir: BlueprintIR, node: str, op: Op) -> Node | None:
    found = next((n for n in ir.nodes if n.id == node), None)
    return found if found is not None and found.op is op else None


def _gated_mlp(ir: BlueprintIR) -> tuple[str, ...]:
    """(gate, up, down) where `ir` is down(silu(gate(h)) * up(h)), else nothing."""
    down = _of(ir, ir.output, Op.LINEAR)
    product = _of(ir, down.inputs[0], Op.MUL) if down else None
    if down is None or product is None or len(ir.nodes) != 5:
        return ()
    for a, b in (product.inputs, product.inputs[::-1]):
        silu, up = _of(ir, a, Op.SILU), _of(ir, b, Op.LINEAR)
        gate = _of(ir, silu.inputs[0], Op.LINEAR) if silu else None
        if gate and up and gate.inputs == up.inputs == (INPUT,):
            return gate.id, up.id, down.id
    return ()


def _low_rank(ir: BlueprintIR) -> tuple[bool, tuple[str, ...]]:
    """Whether h is added, and (down, up), where `ir` is [h +] up(down(h)); else nothing."""
    total = _of(ir, ir.output, Op.ADD)
    last = ir.output
    if total is not None and INPUT in total.inputs:
        last = next((i for i in total.inputs if i != INPUT), INPUT)
    up = _of(ir, last, Op.LINEAR)
    down = _of(ir, up.inputs[0], Op.LINEAR) if up else None
    if up is None or down is None or down.inputs != (INPUT,):
        return False, ()
    return total is not None, (down.id, up.id)
