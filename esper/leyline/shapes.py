"""Shape inference and costs of a blueprint at a site, without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from esper.errors import BlueprintError
from esper.leyline.blueprint import INPUT, BlueprintIR, Node, Op
from esper.leyline.signature import SiteKind, SiteSignature

# Floating-point operations per element, counting a transcendental as 8 (a common weight for
# exp and erf built from polynomials); used to compare blueprints, not to predict time.
_ELEMENTWISE = {Op.RELU: 1, Op.GELU: 8, Op.SILU: 8, Op.TANH: 8, Op.SIGMOID: 8, Op.ADD: 1,
                Op.MUL: 1, Op.SCALE: 1, Op.MEAN_POOL: 1}
_NORM = {Op.LAYER_NORM: 8, Op.RMS_NORM: 5, Op.GROUP_NORM: 8}


@dataclass(frozen=True)
class Value:
    """What flows along an edge: its channel count and whether its positions were pooled to 1."""

    channels: int
    pooled: bool = False


@dataclass(frozen=True)
class Parameter:
    """One learnable tensor of a node. `name` is `<node>.<weight|bias>`."""

    name: str
    shape: tuple[int, ...]
    node: str


@dataclass(frozen=True)
class Cost:
    """What one node adds: elements of its parameters; for one forward pass of one sample,
    floating-point operations and elements of its result."""

    parameters: int
    flops: int
    elements: int


@dataclass(frozen=True)
class Inferred:
    """Values and costs by node id, in the order of the nodes, and parameters in the order
    kernels take them. Costs are those of one sample at `space` positions per axis.
    """

    values: dict[str, Value]
    parameters: tuple[Parameter, ...]
    costs: dict[str, Cost]

    @property
    def parameter_count(self) -> int:
        return sum(c.parameters for c in self.costs.values())

    @property
    def flops(self) -> int:
        """Of one forward pass."""
        return sum(c.flops for c in self.costs.values())


def positions_at(signature: SiteSignature, space: int) -> int:
    """Positions of one sample with `space` of them per axis."""
    return {SiteKind.FEATURES: 1, SiteKind.TOKENS: space, SiteKind.MAP: space * space}[
        signature.kind
    ]


def _node_value(node: Node, inputs: list[Value], signature: SiteSignature) -> Value:
    first = inputs[0]
    match node.op:
        case Op.LINEAR | Op.CONV:
            assert node.out is not None
            if node.op is Op.CONV and first.pooled:
                raise BlueprintError("a convolution needs positions, its input is pooled", node.id)
            return Value(node.out.at(signature.channels), first.pooled)
        case Op.DEPTHWISE if first.pooled:
            raise BlueprintError("a convolution needs positions, its input is pooled", node.id)
        case Op.GROUP_NORM:
            if first.channels % (node.groups or 1):
                raise BlueprintError(
                    f"{node.groups} groups do not divide {first.channels} channels", node.id
                )
            if signature.causal:
                raise BlueprintError("group_norm mixes positions at a causal site", node.id)
        case Op.MEAN_POOL:
            if first.pooled:
                raise BlueprintError("its input is pooled already", node.id)
            if signature.causal:
                raise BlueprintError(
                    "mean_pool mixes later positions into earlier ones at a causal site", node.id
                )
            return Value(first.channels, True)
        case Op.ADD | Op.MUL:
            second = inputs[1]
            if first.channels != second.channels:
                raise BlueprintError(
                    f"{node.op} of {first.channels} and {second.channels} channels; they must be "
                    f"equal at C = {signature.channels}",
                    node.id,
                )
            return Value(first.channels, first.pooled and second.pooled)
        case Op.ATTENTION:
            if len({v.channels for v in inputs}) != 1 or any(v.pooled for v in inputs):
                raise BlueprintError("q, k and v must be unpooled and equally wide", node.id)
            if first.channels % (node.heads or 1):
                raise BlueprintError(
                    f"{node.heads} heads do not divide {first.channels} channels", node.id
                )
    return first


def node_parameters(node: Node, inputs: list[Value], out: Value, kind: SiteKind) -> list[Parameter]:
    """The parameters of one node, weight first. Linear on maps is stored as [O, I, 1, 1]."""

    def named(leaf: str, *shape: int) -> Parameter:
        return Parameter(f"{node.id}.{leaf}", shape, node.id)

    width, k = inputs[0].channels, node.kernel or 1
    bias = [named("bias", out.channels)] if node.has_bias else []
    match node.op:
        case Op.LINEAR if kind is SiteKind.MAP:
            return [named("weight", out.channels, width, 1, 1), *bias]
        case Op.LINEAR:
            return [named("weight", out.channels, width), *bias]
        case Op.CONV:
            return [named("weight", out.channels, width, k, k), *bias]
        case Op.DEPTHWISE:
            spatial = (k, k) if kind is SiteKind.MAP else (k,)
            return [named("weight", width, 1, *spatial), *bias]
        case Op.LAYER_NORM | Op.GROUP_NORM:
            return [named("weight", width), named("bias", width)]
        case Op.RMS_NORM | Op.SCALE:
            return [named("weight", width)]
    return []


def _flops(node: Node, inputs: list[Value], out: Value, kind: SiteKind, positions: int) -> int:
    here = 1 if out.pooled else positions
    k = node.kernel or 1
    window = k * k if kind is SiteKind.MAP else k
    match node.op:
        case Op.LINEAR:
            return 2 * here * inputs[0].channels * out.channels
        case Op.CONV:
            return 2 * here * inputs[0].channels * out.channels * window
        case Op.DEPTHWISE:
            return 2 * here * out.channels * window
        case Op.ATTENTION:
            return 4 * here * here * out.channels + 8 * here * here * (node.heads or 1)
        case Op.MEAN_POOL:
            return positions * out.channels
    return (_ELEMENTWISE | _NORM)[node.op] * here * out.channels


def infer(ir: BlueprintIR, signature: SiteSignature, space: int = 8) -> Inferred:
    """Check every shape of `ir` at `signature` and count its costs.

    Raises:
        BlueprintError: naming the node whose shapes do not fit, or the output's width.
    """
    if ir.kind is not signature.kind:
        raise BlueprintError(f"the blueprint is for {ir.kind} sites, the site is {signature.kind}")
    values = {INPUT: Value(signature.channels)}
    parameters: list[Parameter] = []
    costs: dict[str, Cost] = {}
    positions = positions_at(signature, space)
    for node in ir.nodes:
        inputs = [values[i] for i in node.inputs]
        out = _node_value(node, inputs, signature)
        values[node.id] = out
        own = node_parameters(node, inputs, out, signature.kind)
        parameters += own
        costs[node.id] = Cost(
            parameters=sum(prod(p.shape) for p in own),
            flops=_flops(node, inputs, out, signature.kind, positions),
            elements=out.channels * (1 if out.pooled else positions),
        )
    final = values[ir.output]
    if final.pooled or final.channels != signature.channels:
        raise BlueprintError(
            f"the output has {final.channels} channels{' and is pooled' if final.pooled else ''}; "
            f"it must be shaped as the input, {signature.channels} channels, not pooled",
            ir.output,
        )
    return Inferred(values, tuple(parameters), costs)


def flops_at(ir: BlueprintIR, signature: SiteSignature, positions: tuple[int, ...]) -> int:
    """FLOPs of `ir` in one forward pass of its host, per sample: at a site with an entry in
    `positions` for each call in that pass. A map is counted as the square one of as many positions.

    Raises:
        BlueprintError: as `infer`.
    """
    spaces = (round(p**0.5) if signature.kind is SiteKind.MAP else p for p in positions)
    return sum(infer(ir, signature, max(1, space)).flops for space in spaces)
