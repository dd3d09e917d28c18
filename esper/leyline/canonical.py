"""The canonical form of a blueprint: one spelling per meaning.

Walk the graph depth first from the output and number nodes as they finish. Since inputs
are ordered, that numbering is unique except at commutative nodes; there the inputs are
visited in the order of their subtree hashes. Two inputs with equal hashes may still differ
in what they share with the rest of the graph (one parameter used twice is not two
parameters), so both orders are tried and the smaller spelling wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from esper.errors import BlueprintError
from esper.leyline.base import canonical_json, content_id, sha256
from esper.leyline.ops import EPS, INPUT, SPECS, Node
from esper.leyline.signature import SiteKind

MAX_TIES = 10  # at most 2**10 spellings are compared


def _attributes(node: Node) -> dict[str, Any]:
    attributes = node.model_dump(mode="json", exclude={"id", "inputs"}, exclude_none=True)
    if node.has_bias:
        attributes["bias"] = True  # the default, spelled out
    if attributes.get("init") == "default":
        del attributes["init"]
    if attributes.get("eps") == EPS:
        del attributes["eps"]
    return attributes


def _subtree_hashes(nodes: Sequence[Node]) -> dict[str, str]:
    hashes = {INPUT: sha256(b"input")}
    for node in nodes:
        inputs = [hashes[i] for i in node.inputs]
        if SPECS[node.op].commutative:
            inputs.sort()
        hashes[node.id] = sha256(canonical_json([_attributes(node), inputs]))
    return hashes


def _spell(
    nodes: dict[str, Node], output: str, order: dict[str, tuple[str, ...]]
) -> list[Any]:
    """Serialize with inputs visited in `order`; numbering follows the first visit."""
    number: dict[str, int] = {INPUT: 0}
    spelled: list[Any] = []

    def visit(node_id: str) -> int:
        if node_id not in number:
            inputs = [visit(i) for i in order[node_id]]
            if SPECS[nodes[node_id].op].commutative:
                inputs.sort()
            number[node_id] = len(number)
            spelled.append([_attributes(nodes[node_id]), inputs])
        return number[node_id]

    visit(output)
    return spelled


def canonical_form(version: int, kind: SiteKind, nodes: Sequence[Node], output: str) -> bytes:
    """The canonical bytes of a graph; its name and node ids are not part of them.

    Raises:
        BlueprintError: more than `MAX_TIES` commutative nodes have look-alike inputs.
    """
    hashes = _subtree_hashes(nodes)
    by_id = {n.id: n for n in nodes}
    order: dict[str, tuple[str, ...]] = {}
    ties: list[str] = []
    for node in nodes:
        inputs = node.inputs
        if SPECS[node.op].commutative:
            inputs = tuple(sorted(inputs, key=lambda i: hashes[i]))
            if inputs[0] != inputs[1] and hashes[inputs[0]] == hashes[inputs[1]]:
                ties.append(node.id)
        order[node.id] = inputs
    if len(ties) > MAX_TIES:
        raise BlueprintError(
            f"{len(ties)} commutative nodes have look-alike inputs, at most {MAX_TIES} can be told "
            "apart; use fewer parallel copies of one branch",
            ties[0],
        )
    best: bytes | None = None
    for flips in product((False, True), repeat=len(ties)):
        trial = dict(order)
        for node_id, flip in zip(ties, flips, strict=True):
            if flip:
                trial[node_id] = trial[node_id][::-1]
        spelling = canonical_json([version, kind, _spell(by_id, output, trial)])
        if best is None or spelling < best:
            best = spelling
    assert best is not None
    return best


def blueprint_id(version: int, kind: SiteKind, nodes: Sequence[Node], output: str) -> str:
    """`bp-` and 128 bits of the hash of the canonical form."""
    return content_id("bp", canonical_form(version, kind, nodes, output))
