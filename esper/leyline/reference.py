"""The meaning of the IR, in plain torch: the yardstick kernels are proved against.

`apply` is a pure function of the input and the parameters, so that it can be traced,
differentiated, run in float64, and written out as source for export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.leyline.blueprint import INPUT, BlueprintIR, Init, Node, Op
from esper.leyline.shapes import Inferred, infer
from esper.leyline.signature import SiteKind, SiteSignature


def _linear(x: Tensor, node: Node, p: list[Tensor], sig: SiteSignature) -> Tensor:
    bias = p[1] if len(p) > 1 else None
    if sig.kind is SiteKind.MAP:
        return F.conv2d(x, p[0], bias)
    return F.linear(x, p[0], bias)


def _depthwise(x: Tensor, node: Node, p: list[Tensor], sig: SiteSignature) -> Tensor:
    k = node.kernel or 1
    bias = p[1] if len(p) > 1 else None
    if sig.kind is SiteKind.MAP:
        return F.conv2d(x, p[0], bias, padding=k // 2, groups=x.shape[1])
    x = x.transpose(1, 2)
    x = F.pad(x, (k - 1, 0) if sig.causal else (k // 2, k // 2))
    return F.conv1d(x, p[0], bias, groups=x.shape[1]).transpose(1, 2)


def _over_channels(x: Tensor, node: Node, p: list[Tensor], sig: SiteSignature) -> Tensor:
    """Layer or RMS normalisation over the channel axis at each position."""
    if sig.kind is SiteKind.MAP:
        return _over_channels(x.movedim(1, -1), node, p, _LAST).movedim(-1, 1)
    if node.op is Op.LAYER_NORM:
        return F.layer_norm(x, (x.shape[-1],), p[0], p[1], node.epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + node.epsilon) * p[0]


_LAST = SiteSignature(kind=SiteKind.TOKENS, channels=1)  # any kind with channels last


def _attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool
) -> Tensor:
    b, t, c = q.shape
    q, k, v = (x.reshape(b, t, heads, c // heads).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).reshape(b, t, c)


def _scale(x: Tensor, weight: Tensor, sig: SiteSignature) -> Tensor:
    return x * (weight.view(1, -1, 1, 1) if sig.kind is SiteKind.MAP else weight)


def _node(node: Node, x: list[Tensor], p: list[Tensor], sig: SiteSignature) -> Tensor:
    match node.op:
        case Op.LINEAR:
            return _linear(x[0], node, p, sig)
        case Op.CONV:
            bias = p[1] if len(p) > 1 else None
            return F.conv2d(x[0], p[0], bias, padding=(node.kernel or 1) // 2)
        case Op.DEPTHWISE:
            return _depthwise(x[0], node, p, sig)
        case Op.LAYER_NORM | Op.RMS_NORM:
            return _over_channels(x[0], node, p, sig)
        case Op.GROUP_NORM:
            # Not F.group_norm, which refuses a group of one value; here that is its bias.
            return torch.group_norm(x[0], node.groups or 1, p[0], p[1], node.epsilon)
        case Op.RELU:
            return F.relu(x[0])
        case Op.GELU:
            return F.gelu(x[0])
        case Op.SILU:
            return F.silu(x[0])
        case Op.TANH:
            return torch.tanh(x[0])
        case Op.SIGMOID:
            return torch.sigmoid(x[0])
        case Op.ADD:
            return x[0] + x[1]
        case Op.MUL:
            return x[0] * x[1]
        case Op.SCALE:
            return _scale(x[0], p[0], sig)
        case Op.MEAN_POOL:
            return x[0].mean((2, 3) if sig.kind is SiteKind.MAP else 1, keepdim=True)
        case Op.ATTENTION:
            return _attention(x[0], x[1], x[2], node.heads or 1, sig.causal)


Function = Callable[[Tensor, Sequence[Tensor]], Tensor]


def function(ir: BlueprintIR, signature: SiteSignature) -> Function:
    """The blueprint as a function of `h` and the parameters, ready to be called often.

    Parameters come in the order of `shapes.infer(...).parameters`. Shapes: `h` and the result
    as `signature.shape(...)`; any batch and space.
    """
    owners = [p.node for p in infer(ir, signature).parameters]
    steps = [(node, [i for i, owner in enumerate(owners) if owner == node.id])
             for node in ir.nodes]

    def run(h: Tensor, params: Sequence[Tensor]) -> Tensor:
        if len(params) != len(owners):
            raise ValueError(f"{len(params)} parameters were given, the blueprint has "
                             f"{len(owners)}; pass them in the order of its inference")
        values = {INPUT: h}
        for node, own in steps:
            inputs = [values[i] for i in node.inputs]
            values[node.id] = _node(node, inputs, [params[i] for i in own], signature)
        return values[ir.output]

    return run


def apply(
    ir: BlueprintIR, signature: SiteSignature, h: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """Run the blueprint once; see `function`."""
    return function(ir, signature)(h, params)


def blend(h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
    """`h` where alpha is 0, `s` where alpha is 1, else h + alpha * (s - h).

    Selecting at both ends keeps a NaN or infinity of the unused side out. `alpha` is a
    0-dim float32 tensor.
    """
    a = alpha.to(h.dtype)
    mixed = h + a * (s - h)
    return torch.where(alpha == 0, h, torch.where(alpha == 1, s, mixed))


class _Isolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def isolated(h: Tensor, s: Tensor) -> Tensor:
    """`h` itself, as the host sees a seed in TRAINING; the gradient that arrives there goes to `h`
    and to the seed's output `s` alike."""
    out: Tensor = _Isolated.apply(h, s)
    return out


def initial_parameters(
    ir: BlueprintIR,
    signature: SiteSignature,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Fresh parameters, in kernel order, drawn on the CPU so that devices agree.

    Weights: uniform in +-1/sqrt(fan_in), torch's own default for linear and convolution
    layers; norms and scales start at one, their biases at zero; `Init.ZERO` nodes at zero.
    """
    inferred: Inferred = infer(ir, signature)
    dtype = getattr(torch, signature.dtype)
    fan_in: dict[str, int] = {}
    made: list[Tensor] = []
    for p in inferred.parameters:
        node = ir.node(p.node)
        if p.name.endswith(".weight"):
            fan_in[p.node] = max(1, torch.Size(p.shape[1:]).numel())
        if node.init is Init.ZERO:
            value = torch.zeros(p.shape)
        elif node.op in (Op.LAYER_NORM, Op.RMS_NORM, Op.GROUP_NORM, Op.SCALE):
            value = torch.ones(p.shape) if p.name.endswith(".weight") else torch.zeros(p.shape)
        else:
            bound = fan_in[p.node] ** -0.5
            value = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
        made.append(value.to(device=device, dtype=dtype))
    return made
