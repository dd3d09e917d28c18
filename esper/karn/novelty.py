"""How unlike two blueprints are, by their structure.

A graph becomes a bag of labels: every node's operation with what distinguishes it, then twice over
with the labels of its inputs and of its users taken in (the subtree features of Weisfeiler and
Lehman: Shervashidze et al., JMLR 2011). The distance of two bags is one less the share that they
have in common (weighted Jaccard), so it is a metric between 0 and 1. How novel a blueprint is
among others is its mean distance to the nearest few (Lehman and Stanley, Abandoning objectives,
2011).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from esper.leyline.base import canonical_json, sha256
from esper.leyline.blueprint import INPUT, SPECS, BlueprintIR, Node

ROUNDS = 2
NEAREST = 3
Bag = Mapping[str, int]


def _label(node: Node) -> str:
    said = node.model_dump(mode="json", include={"op", "out", "kernel", "groups", "heads"},
                           exclude_none=True)
    return sha256(canonical_json([said, node.has_bias, node.zero_at_birth]))


@lru_cache(maxsize=4096)
def _bag(ir: str) -> Bag:
    blueprint = BlueprintIR.model_validate_json(ir)
    users: dict[str, list[str]] = {INPUT: []}
    for node in blueprint.nodes:
        users[node.id] = []
        for source in node.inputs:
            users[source].append(node.id)
    labels = {INPUT: "input", **{n.id: _label(n) for n in blueprint.nodes}}
    bag = Counter(labels.values())
    for _ in range(ROUNDS):
        fresh = {INPUT: sha256(canonical_json(["input", sorted(labels[u] for u in users[INPUT])]))}
        for node in blueprint.nodes:
            inputs = [labels[i] for i in node.inputs]
            if SPECS[node.op].commutative:
                inputs.sort()
            fresh[node.id] = sha256(canonical_json(
                [labels[node.id], inputs, sorted(labels[u] for u in users[node.id])]))
        labels = fresh
        bag.update(labels.values())
    return bag


def bag(ir: BlueprintIR) -> Bag:
    """The labels of a blueprint, with how often each occurs. The same for equal graphs."""
    return _bag(ir.model_copy(update={"name": ""}).to_json())


def distance(a: Bag, b: Bag) -> float:
    """From 0, no label tells them apart, to 1, they have none in common."""
    keys = a.keys() | b.keys()
    shared = sum(min(a.get(k, 0), b.get(k, 0)) for k in keys)
    return 1 - shared / sum(max(a.get(k, 0), b.get(k, 0)) for k in keys)


def novelty(own: Bag, others: Iterable[Bag]) -> float | None:
    """Mean distance to the `NEAREST` of `others`; None where there are none."""
    nearest = sorted(distance(own, other) for other in others)[:NEAREST]
    return sum(nearest) / len(nearest) if nearest else None
