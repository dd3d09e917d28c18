"""Static analysis: what can be known of a blueprint without running it.

Two facts are proven by abstract interpretation over "is this value zero at birth":
the output equals the input at birth, and a gradient reaches every parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import BlueprintError
from esper.leyline.blueprint import INPUT, BlueprintIR, Node, Op
from esper.leyline.shapes import Inferred, infer
from esper.leyline.signature import SiteSignature

# f(0) = 0 without help from a bias: what zero goes into, zero comes out of.
_KEEPS_ZERO = frozenset({Op.RELU, Op.GELU, Op.SILU, Op.TANH, Op.SCALE, Op.MEAN_POOL, Op.RMS_NORM})
# With a fresh zero bias a normalisation of zeros is zero too.
_NORMS = frozenset({Op.LAYER_NORM, Op.GROUP_NORM})


@dataclass(frozen=True)
class Budget:
    """The most that one blueprint may cost at a site of C channels.

    Parameters are in multiples of C * C (with a floor for narrow sites), FLOPs per position
    in multiples of the same; `depth` is the longest chain of nodes.
    """

    parameters_per_cc: float = 16.0
    minimum_parameters: int = 4096
    flops: int = 1 << 31
    activation_elements: int = 1 << 26
    depth: int = 24


def analyse(
    ir: BlueprintIR, signature: SiteSignature, budget: Budget | None = None
) -> Inferred:
    """Everything that is checked before a compiler sees a blueprint.

    Raises:
        BlueprintError: naming the node, or the figure that is over budget.
    """
    inferred = infer(ir, signature)
    _within(ir, signature, inferred, budget or Budget())
    _identity_at_birth(ir)
    _every_parameter_learns(ir, inferred)
    return inferred


def _within(
    ir: BlueprintIR, signature: SiteSignature, inferred: Inferred, budget: Budget
) -> None:
    limit = max(budget.minimum_parameters, int(budget.parameters_per_cc * signature.channels**2))
    depth = {INPUT: 0}
    for node in ir.nodes:
        depth[node.id] = 1 + max(depth[i] for i in node.inputs)
    for what, value, most in (
        ("parameters", inferred.parameter_count, limit),
        ("FLOPs per sample", inferred.flops, budget.flops),
        ("activation elements per sample", inferred.activation_elements,
         budget.activation_elements),
        ("nodes in a chain", depth[ir.output], budget.depth),
    ):
        if value > most:
            raise BlueprintError(f"{value} {what}, the budget at {signature} is {most}")


def _zeros(ir: BlueprintIR, awake: frozenset[str] = frozenset()) -> dict[str, bool]:
    """Which values are zero while only the parameters in `awake` have left their birth."""
    zero = {INPUT: False}
    for node in ir.nodes:
        inputs = [zero[i] for i in node.inputs]
        weightless = node.zero_at_birth and f"{node.id}.weight" not in awake
        # A bias of zero stays away until it has learnt; one that starts at random never does.
        biased = node.has_bias and (not node.zero_at_birth or f"{node.id}.bias" in awake)
        if node.op is Op.ADD:
            zero[node.id] = all(inputs)
        elif node.op is Op.MUL:
            zero[node.id] = any(inputs)
        elif node.op is Op.ATTENTION:
            zero[node.id] = inputs[2]  # a weighted mean of values that are zero
        elif node.op in _NORMS:
            zero[node.id] = inputs[0] and f"{node.id}.bias" not in awake
        elif node.op in (Op.LINEAR, Op.CONV, Op.DEPTHWISE):
            zero[node.id] = (inputs[0] or weightless) and not biased
        elif node.op in _KEEPS_ZERO:
            zero[node.id] = inputs[0] or weightless
        else:
            zero[node.id] = False
    return zero


def _identity_at_birth(ir: BlueprintIR) -> None:
    """The output is h plus values that are zero at birth."""
    zero = _zeros(ir)
    nodes = {n.id: n for n in ir.nodes}

    def is_h(name: str) -> bool:
        if name == INPUT:
            return True
        node = nodes[name]
        if node.op is not Op.ADD:
            return False
        a, b = node.inputs
        return (is_h(a) and zero[b]) or (is_h(b) and zero[a])

    if not is_h(ir.output):
        raise BlueprintError(
            "the output is not the input at birth; make it add(h, f) with the last layer of f "
            "at init 'zero'", ir.output,
        )


def _gradient_flows(node: Node, index: int, zero: dict[str, bool], awake: frozenset[str]) -> bool:
    """Whether a gradient at `node` reaches its input number `index`."""
    if node.op is Op.MUL:
        return not zero[node.inputs[1 - index]]
    if node.zero_at_birth and f"{node.id}.weight" not in awake:
        return False  # it would be multiplied by a weight of zero
    if node.op is Op.ATTENTION and index < 2:
        return not zero[node.inputs[2]]  # equal values: the weights do not matter
    return True


def _every_parameter_learns(ir: BlueprintIR, inferred: Inferred) -> None:
    """Some parameter gets a gradient at birth; once it moved, others do; until all have.

    A parameter whose turn never comes is dead: behind two zero layers in series, say. A bias
    learns wherever a gradient arrives; a weight only where its input is not zero as well.
    """
    awake: frozenset[str] = frozenset()
    while True:
        zero = _zeros(ir, awake)
        live = {ir.output}
        for node in reversed(ir.nodes):
            if node.id in live:
                live.update(
                    source for index, source in enumerate(node.inputs)
                    if _gradient_flows(node, index, zero, awake)
                )
        grown = awake | {
            p.name for p in inferred.parameters
            if p.node in live
            and (p.name.endswith(".bias") or not zero[ir.node(p.node).inputs[0]])
        }
        if grown == awake:
            break
        awake = grown
    for parameter in inferred.parameters:
        if parameter.name not in awake:
            raise BlueprintError(
                f"no gradient ever reaches {parameter.name}; is it behind two zero layers, or "
                "multiplied by zero?", parameter.node,
            )
