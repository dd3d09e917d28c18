"""Static analysis: what can be known of a blueprint without running it.

Two facts are proven by abstract interpretation over "is this value zero at birth":
the output equals the input at birth, and a gradient reaches every parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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

    Parameters are in multiples of C * C, with a floor for narrow sites. FLOPs are those of one
    forward pass of one sample at 8 positions per axis, as `shapes.infer` counts them.
    `memory_bytes` bounds what a training step of that sample holds at most: the result of every
    node, as if all were saved for the backward, and the parameters, in the signature's type.

    A node's level is the length of the longest chain from the input to it. `depth` bounds the
    levels. `width` bounds the values that are needed at once when nodes run level by level: what
    is made on a level or before it and read after it, the input included. Both are the same for
    every order in which a graph's nodes can be listed.
    """

    parameters_per_cc: float = 16.0
    minimum_parameters: int = 4096
    flops: int = 1 << 31
    memory_bytes: int = 1 << 28
    depth: int = 24
    width: int = 16


def analyse(
    ir: BlueprintIR, signature: SiteSignature, budget: Budget | None = None
) -> Inferred:
    """Everything that is checked before a compiler sees a blueprint.

    What has to hold at birth is asked of seeds only: a standalone kernel computes what a module
    of the user's does, however that module starts and whatever in it is idle.

    Raises:
        BlueprintError: naming the node, or the figure that is over budget.
    """
    inferred = infer(ir, signature)
    _within(ir, signature, inferred, budget or Budget())
    if not signature.standalone:
        _identity_at_birth(ir)
        _every_parameter_learns(ir, inferred)
    return inferred


def _within(
    ir: BlueprintIR, signature: SiteSignature, inferred: Inferred, budget: Budget
) -> None:
    """Refuse what is over budget, at the node that makes it so."""
    costs, itemsize = inferred.costs, signature.dtype.itemsize
    limit = max(budget.minimum_parameters, int(budget.parameters_per_cc * signature.channels**2))
    for what, added, most in (
        ("parameters", {n: c.parameters for n, c in costs.items()}, limit),
        ("FLOPs per sample", {n: c.flops for n, c in costs.items()}, budget.flops),
        (f"bytes of {signature.dtype} per sample",
         {n: itemsize * (c.parameters + c.elements) for n, c in costs.items()},
         budget.memory_bytes),
    ):
        total = 0
        for node_id, own in added.items():
            total += own
            if total > most:
                raise BlueprintError(
                    f"{total} {what} with this node, {sum(added.values())} in all; the budget at "
                    f"{signature} is {most}", node_id,
                )
    _not_too_deep_or_wide(ir, budget)


def _not_too_deep_or_wide(ir: BlueprintIR, budget: Budget) -> None:
    level = {INPUT: 0}
    last_read = {INPUT: 0}  # the level of the last node that reads a value
    for node in ir.nodes:
        level[node.id] = 1 + max(level[i] for i in node.inputs)
        if level[node.id] > budget.depth:
            raise BlueprintError(
                f"it is number {level[node.id]} in a chain from the input; the budget is "
                f"{budget.depth}", node.id,
            )
        last_read |= {i: max(level[node.id], last_read.get(i, 0)) for i in node.inputs}
    for here in range(max(level.values())):
        needed = [v for v in level if level[v] <= here < last_read.get(v, 0)]
        if len(needed) > budget.width:
            raise BlueprintError(
                f"{len(needed)} values are needed at once after level {here} "
                f"({', '.join(needed)}); the budget is {budget.width}",
                needed[budget.width],
            )


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
    is_h = {INPUT: True}
    for node in ir.nodes:
        a, b = node.inputs if node.op is Op.ADD else (INPUT, INPUT)
        is_h[node.id] = node.op is Op.ADD and (
            (is_h[a] and zero[b]) or (is_h[b] and zero[a])
        )
    if not is_h[ir.output]:
        raise BlueprintError(
            "the output is not the input at birth; make it add(h, f) with the last layer of f "
            "at init 'zero'", ir.output,
        )


class Flow(IntEnum):
    """What is known of the gradient at a value; of several, the greatest holds.

    A balanced gradient sums to zero over the positions of every sample and channel. It moves
    weights, but no bias, for a bias gets just that sum. A bias before a group_norm with one
    channel per group is as idle, and is let through: templates use it at sites of few channels.
    """

    NONE = 0
    BALANCED = 1
    FREE = 2


def _normalises_one_value(node: Node, inferred: Inferred) -> bool:
    """A mean over one value is that value: the result is the bias, whatever comes in."""
    if node.op not in _NORMS:
        return False
    width = inferred.values[node.inputs[0]]
    if node.op is Op.LAYER_NORM:
        return width.channels == 1
    return width.pooled and node.groups == width.channels


def _passed_on(
    node: Node, index: int, arriving: Flow, zero: dict[str, bool], awake: frozenset[str],
    inferred: Inferred,
) -> Flow:
    """What reaches input number `index` of a node at whose output `arriving` arrives."""
    source = node.inputs[index]
    if arriving is Flow.NONE or _normalises_one_value(node, inferred):
        return Flow.NONE
    if node.zero_at_birth and f"{node.id}.weight" not in awake:
        return Flow.NONE  # it would be multiplied by a weight of zero
    match node.op:
        case Op.RELU if zero[source]:
            return Flow.NONE  # its derivative at zero is zero, so it stays there for good
        case Op.MUL if zero[node.inputs[1 - index]]:
            return Flow.NONE
        case Op.ATTENTION if index < 2:
            if zero[node.inputs[2]] or zero[node.inputs[1 - index]]:
                return Flow.NONE  # equal values, or equal scores whatever this one is
            # The same shift of every key leaves the softmax as it is.
            return Flow.BALANCED if index == 1 else Flow.FREE
        case Op.ADD if inferred.values[source].pooled and not inferred.values[node.id].pooled:
            # Broadcast over the positions, so its gradient is the sum over them.
            return Flow.NONE if arriving is Flow.BALANCED else Flow.FREE
        case Op.ADD | Op.LINEAR | Op.SCALE:
            return arriving  # the same at every position, so a balance is kept
    return Flow.FREE


def _every_parameter_learns(ir: BlueprintIR, inferred: Inferred) -> None:
    """Some parameter gets a gradient at birth; once it moved, others do; until all have.

    A parameter whose turn never comes is dead: behind two zero layers in series, say.
    """
    awake: frozenset[str] = frozenset()
    while True:
        zero = _zeros(ir, awake)
        flow = dict.fromkeys((INPUT, *(n.id for n in ir.nodes)), Flow.NONE)
        flow[ir.output] = Flow.FREE
        for node in reversed(ir.nodes):
            for index, source in enumerate(node.inputs):
                passed = _passed_on(node, index, flow[node.id], zero, awake, inferred)
                flow[source] = max(flow[source], passed)
        grown = set(awake)
        for p in inferred.parameters:
            node = ir.node(p.node)
            if p.name.endswith(".bias"):
                moves = flow[node.id] is Flow.FREE
            else:
                moves = (
                    flow[node.id] is not Flow.NONE and not zero[node.inputs[0]]
                    and not _normalises_one_value(node, inferred)
                )
            if moves:
                grown.add(p.name)
        if grown == awake:
            break
        awake = frozenset(grown)
    for p in inferred.parameters:
        if p.name not in awake:
            raise BlueprintError(f"no gradient ever reaches {p.name}; {_why(flow[p.node])}", p.node)


def _why(flow: Flow) -> str:
    if flow is Flow.BALANCED:
        return (
            "attention does not see a shift that all keys share, so leave the bias out "
            "('bias': false)"
        )
    return (
        "is it behind two zero layers, multiplied by zero, under a relu of zero, or the weight "
        "of a norm over a single value? Keep one layer at init 'zero', the last one"
    )
