"""Blueprint templates: sub-networks the field knows to be useful, one function each.

Every template is h plus something that is exactly zero at birth, with only one zero factor
in series, so that the host is not disturbed and every parameter can learn.
"""

from __future__ import annotations

from collections.abc import Callable

from esper.errors import BlueprintError
from esper.leyline.blueprint import INPUT, BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature

HALF, QUARTER, EIGHTH = (Width(times=1, over=n) for n in (2, 4, 8))
DOUBLE = Width(times=2)


class Sketch:
    """Writes nodes down in order; each method returns the id of what it added."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, op: Op, *inputs: str, **fields: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(id=name, op=op, inputs=inputs, **fields))  # type: ignore[arg-type]
        return name

    def linear(self, source: str, out: Width, **fields: object) -> str:
        return self.add(Op.LINEAR, source, out=out, **fields)

    def residual(self, kind: SiteKind, name: str, branch: str) -> BlueprintIR:
        """h + branch, where the branch is zero at birth."""
        out = self.add(Op.ADD, INPUT, branch)
        return BlueprintIR(kind=kind, name=name, nodes=tuple(self.nodes), output=out)

    def project(self, kind: SiteKind, name: str, source: str) -> BlueprintIR:
        """h + zero-initialised projection of `source` to C channels."""
        return self.residual(kind, name, self.linear(source, C, init=Init.ZERO))


def divisor(channels: int, *wanted: int) -> int:
    """The first of `wanted` that divides `channels`, or 1."""
    return next((n for n in wanted if channels % n == 0), 1)


# -- any layout ---------------------------------------------------------------------------


def bottleneck(signature: SiteSignature) -> BlueprintIR:
    """Down to half the channels, GELU, up again (He et al. 2016; adapters, Houlsby 2019)."""
    s = Sketch()
    hidden = s.add(Op.GELU, s.linear(INPUT, HALF))
    return s.project(signature.kind, "bottleneck", hidden)


def wide(signature: SiteSignature) -> BlueprintIR:
    """Normalised, twice the channels, ReLU: capacity first (the transformer's own MLP)."""
    s = Sketch()
    hidden = s.add(Op.RELU, s.linear(s.add(Op.LAYER_NORM, INPUT), DOUBLE))
    return s.project(signature.kind, "wide", hidden)


def gated(signature: SiteSignature) -> BlueprintIR:
    """silu(Wx) * Vx on an RMS norm (SwiGLU, Shazeer 2020)."""
    s = Sketch()
    x = s.add(Op.RMS_NORM, INPUT)
    gate = s.add(Op.SILU, s.linear(x, C, bias=False))
    return s.project(signature.kind, "gated", s.add(Op.MUL, gate, s.linear(x, C, bias=False)))


def low_rank(signature: SiteSignature) -> BlueprintIR:
    """A linear map of rank C/8 (LoRA, Hu et al. 2021)."""
    s = Sketch()
    return s.residual(
        signature.kind, "low rank",
        s.linear(s.linear(INPUT, EIGHTH, bias=False), C, bias=False, init=Init.ZERO),
    )


def channel_gate(signature: SiteSignature) -> BlueprintIR:
    """h + h * tanh(gate(h)): rescales channels position by position."""
    s = Sketch()
    hidden = s.add(Op.SILU, s.linear(INPUT, QUARTER))
    gate = s.add(Op.TANH, s.linear(hidden, C, init=Init.ZERO))
    return s.residual(signature.kind, "channel gate", s.add(Op.MUL, INPUT, gate))


# -- tokens -------------------------------------------------------------------------------


def attention(signature: SiteSignature) -> BlueprintIR:
    """Pre-norm self-attention with few heads (Vaswani et al. 2017)."""
    s = Sketch()
    x = s.add(Op.LAYER_NORM, INPUT)
    q, k, v = (s.linear(x, C, bias=False) for _ in range(3))
    heads = divisor(signature.channels, 4, 3, 2)
    return s.project(signature.kind, "attention", s.add(Op.ATTENTION, q, k, v, heads=heads))


def token_mixer(signature: SiteSignature) -> BlueprintIR:
    """Depthwise convolution along the sequence, then across channels."""
    s = Sketch()
    x = s.add(Op.DEPTHWISE, s.add(Op.LAYER_NORM, INPUT), kernel=5)
    return s.project(signature.kind, "token mixer", s.add(Op.GELU, x))


# -- maps ---------------------------------------------------------------------------------


def depthwise_separable(signature: SiteSignature) -> BlueprintIR:
    """3x3 per channel, group norm, GELU, 1x1 (Chollet 2017; ConvNeXt, Liu et al. 2022)."""
    s = Sketch()
    x = s.add(Op.DEPTHWISE, INPUT, kernel=3)
    x = s.add(Op.GROUP_NORM, x, groups=divisor(signature.channels, 4, 2))
    return s.project(signature.kind, "depthwise separable", s.add(Op.GELU, x))


def bottleneck_conv(signature: SiteSignature) -> BlueprintIR:
    """1x1 down, 3x3, 1x1 up (He et al. 2016)."""
    s = Sketch()
    x = s.add(Op.RELU, s.linear(INPUT, HALF))
    x = s.add(Op.RELU, s.add(Op.CONV, x, out=HALF, kernel=3))
    return s.project(signature.kind, "bottleneck conv", x)


def squeeze_excite(signature: SiteSignature) -> BlueprintIR:
    """Channel weights from the mean over the map (Hu et al. 2018), as 1 + tanh."""
    s = Sketch()
    x = s.add(Op.RELU, s.linear(s.add(Op.MEAN_POOL, INPUT), QUARTER))
    gate = s.add(Op.TANH, s.linear(x, C, init=Init.ZERO))
    return s.residual(signature.kind, "squeeze excite", s.add(Op.MUL, INPUT, gate))


def inverted_residual(signature: SiteSignature) -> BlueprintIR:
    """1x1 up, 3x3 per channel, 1x1 down (MobileNetV2, Sandler et al. 2018)."""
    s = Sketch()
    x = s.add(Op.SILU, s.linear(INPUT, DOUBLE))
    x = s.add(Op.SILU, s.add(Op.DEPTHWISE, x, kernel=3))
    return s.project(signature.kind, "inverted residual", x)


def dense_conv(signature: SiteSignature) -> BlueprintIR:
    """Two full 3x3 convolutions at twice the width: the dear one."""
    s = Sketch()
    x = s.add(Op.RELU, s.add(Op.CONV, INPUT, out=DOUBLE, kernel=3))
    last = s.add(Op.CONV, x, out=C, kernel=3, init=Init.ZERO)
    return s.residual(signature.kind, "dense conv", last)


Template = Callable[[SiteSignature], BlueprintIR]

# In the order in which they are tried: promising first, and unlike what came before.
TEMPLATES: dict[SiteKind, tuple[Template, ...]] = {
    SiteKind.FEATURES: (bottleneck, gated, low_rank, wide, channel_gate),
    SiteKind.TOKENS: (bottleneck, attention, gated, token_mixer, low_rank, channel_gate, wide),
    SiteKind.MAP: (depthwise_separable, bottleneck_conv, dense_conv, squeeze_excite, gated,
                   inverted_residual, low_rank, bottleneck),
}


def templates_for(signature: SiteSignature) -> list[BlueprintIR]:
    """The templates that fit `signature`; those whose shapes do not are left out."""
    fitting = []
    for template in TEMPLATES[signature.kind]:
        ir = template(signature)
        try:
            infer(ir, signature)
        except BlueprintError:
            continue  # pooling at a causal site, say
        fitting.append(ir)
    return fitting
