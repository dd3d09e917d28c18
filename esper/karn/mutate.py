"""Mutation: small changes to a blueprint that keep it honest.

Nodes that start at zero and the sum with h are never touched, so that a mutant still equals
its input at birth; shapes are inferred anew, and what does not fit is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pydantic import ValidationError

from esper.errors import BlueprintError
from esper.leyline.blueprint import INPUT, BlueprintIR, Node, Op, Width
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature

ATTEMPTS = 40  # tries for something new before giving up on a parent

_ACTIVATIONS = (Op.RELU, Op.GELU, Op.SILU, Op.TANH)
_WIDTHS = tuple(Width(times=t, over=o) for t, o in ((1, 8), (1, 4), (1, 2), (3, 4), (1, 1), (2, 1)))
_INSERTED = (Op.LAYER_NORM, Op.RMS_NORM, Op.SCALE, *_ACTIVATIONS)

Nodes = list[Node]


def _free(nodes: Nodes) -> list[int]:
    """Places of nodes that may change without touching what happens at birth."""
    return [i for i, n in enumerate(nodes) if not n.zero_at_birth and n.op is not Op.ADD]


def _pick(nodes: Nodes, rng: random.Random, fits: Callable[[Node], bool]) -> int | None:
    places = [i for i in _free(nodes) if fits(nodes[i])]
    return rng.choice(places) if places else None


def _replace(nodes: Nodes, place: int, **fields: object) -> None:
    data = nodes[place].model_dump(exclude_none=True)
    nodes[place] = Node.model_validate({**data, **fields})


def _change_width(nodes: Nodes, rng: random.Random) -> None:
    """A new width for a hidden layer, and for its siblings that must stay as wide."""
    place = _pick(nodes, rng, lambda n: n.out is not None)
    if place is not None:
        before, after = nodes[place].out, rng.choice(_WIDTHS)
        for i in _free(nodes):
            if nodes[i].out == before:
                _replace(nodes, i, out=after)


def _change_activation(nodes: Nodes, rng: random.Random) -> None:
    place = _pick(nodes, rng, lambda n: n.op in _ACTIVATIONS)
    if place is not None:
        _replace(nodes, place, op=rng.choice(_ACTIVATIONS))


def _change_kernel(nodes: Nodes, rng: random.Random) -> None:
    place = _pick(nodes, rng, lambda n: n.kernel is not None)
    if place is not None:
        _replace(nodes, place, kernel=rng.choice((1, 3, 5, 7)))


def _change_split(nodes: Nodes, rng: random.Random) -> None:
    place = _pick(nodes, rng, lambda n: n.heads is not None or n.groups is not None)
    if place is not None:
        field = "heads" if nodes[place].heads is not None else "groups"
        _replace(nodes, place, **{field: rng.choice((1, 2, 4, 8))})


def _toggle_bias(nodes: Nodes, rng: random.Random) -> None:
    place = _pick(nodes, rng, lambda n: n.op in (Op.LINEAR, Op.CONV, Op.DEPTHWISE))
    if place is not None:
        _replace(nodes, place, bias=not nodes[place].has_bias)


def _insert(nodes: Nodes, rng: random.Random) -> None:
    """A norm, scale or activation behind a node of the branch."""
    place = _pick(nodes, rng, lambda n: True)
    if place is None:
        return
    source = nodes[place].id
    taken = {n.id for n in nodes}
    name = next(f"m{i}" for i in range(len(nodes) + 1) if f"m{i}" not in taken)
    for i in range(place + 1, len(nodes)):
        inputs = tuple(name if s == source else s for s in nodes[i].inputs)
        if inputs != nodes[i].inputs:
            _replace(nodes, i, inputs=inputs)
    nodes.insert(place + 1, Node(id=name, op=rng.choice(_INSERTED), inputs=(source,)))


def _remove(nodes: Nodes, rng: random.Random) -> None:
    """Take out a node of one input that changes no shape."""
    place = _pick(nodes, rng, lambda n: n.op in _INSERTED or n.op is Op.GROUP_NORM)
    if place is None:
        return
    gone = nodes.pop(place)
    for i in range(place, len(nodes)):
        inputs = tuple(gone.inputs[0] if s == gone.id else s for s in nodes[i].inputs)
        if inputs != nodes[i].inputs:
            _replace(nodes, i, inputs=inputs)


_CHANGES = (_change_width, _change_activation, _change_kernel, _change_split, _toggle_bias,
            _insert, _remove)


def _still_identity(nodes: Nodes) -> bool:
    """The last node still adds to h a branch in which something starts at zero."""
    return nodes[-1].op is Op.ADD and INPUT in nodes[-1].inputs and any(
        n.zero_at_birth for n in nodes
    )


def mutate(
    ir: BlueprintIR, signature: SiteSignature, rng: random.Random, known: set[str]
) -> BlueprintIR | None:
    """One to three changes to `ir`, valid at `signature` and not in `known`; None if none was
    found in `ATTEMPTS` tries."""
    for _ in range(ATTEMPTS):
        nodes = list(ir.nodes)
        try:
            for _ in range(rng.choice((1, 1, 2, 3))):
                rng.choice(_CHANGES)(nodes, rng)
            mutant = ir.model_copy(update={"nodes": tuple(nodes)})
            mutant = BlueprintIR.model_validate(mutant.model_dump(exclude_none=True))
            infer(mutant, signature)
            if _still_identity(nodes) and mutant.id not in known:
                return mutant
        except (BlueprintError, ValidationError):
            continue
    return None
