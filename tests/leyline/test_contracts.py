"""Properties of the contracts: canonical ids, JSON forms, transition tables, meaning."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import BlueprintError, IllegalTransition
from esper.leyline.blueprint import (
    INPUT,
    MAX_JSON_BYTES,
    SPECS,
    BlueprintIR,
    C,
    Init,
    Node,
    Op,
    Width,
    parse_blueprint,
)
from esper.leyline.lifecycle import (
    SEED_TRANSITIONS,
    SeedState,
    as_markdown,
    check,
    type_tables,
)
from esper.leyline.reference import apply, blend, initial_parameters
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature

UNARY = [Op.LINEAR, Op.LAYER_NORM, Op.RMS_NORM, Op.RELU, Op.GELU, Op.SILU, Op.TANH, Op.SIGMOID,
         Op.SCALE]


@st.composite
def blueprints(draw: st.DrawFn, kind: SiteKind | None = None) -> BlueprintIR:
    """A random graph in which every value keeps C channels, so that all shapes fit."""
    kind = kind or draw(st.sampled_from(list(SiteKind)))
    ops = [*UNARY, Op.ADD, Op.MUL]
    if kind is SiteKind.TOKENS:
        ops += [Op.ATTENTION, Op.DEPTHWISE]
    if kind is SiteKind.MAP:
        ops += [Op.CONV, Op.DEPTHWISE, Op.GROUP_NORM]
    nodes: list[Node] = []
    unused: list[str] = []
    names = [INPUT]
    for i in range(draw(st.integers(1, 7))):
        op = draw(st.sampled_from(ops))
        inputs = tuple(draw(st.sampled_from(names)) for _ in range(SPECS[op].arity))
        nodes.append(_node(draw, f"x{i}", op, inputs))
        names.append(f"x{i}")
        unused = [n for n in unused if n not in inputs] + [f"x{i}"]
    while len(unused) > 1:  # every node must reach the output
        a, b = unused.pop(), unused.pop()
        nodes.append(Node(id=f"x{len(nodes)}", op=Op.ADD, inputs=(a, b)))
        unused.append(nodes[-1].id)
    return BlueprintIR(kind=kind, nodes=tuple(nodes), output=unused[0])


def _node(draw: st.DrawFn, name: str, op: Op, inputs: tuple[str, ...]) -> Node:
    fields: dict[str, object] = {}
    if op in (Op.LINEAR, Op.CONV):
        fields["out"] = C
    if op in (Op.CONV, Op.DEPTHWISE):
        fields["kernel"] = draw(st.sampled_from([1, 3]))
    if op is Op.GROUP_NORM:
        fields["groups"] = draw(st.sampled_from([1, 2]))
    if op is Op.ATTENTION:
        fields["heads"] = draw(st.sampled_from([1, 2]))
    if "bias" in SPECS[op].allows:
        fields["bias"] = draw(st.sampled_from([None, True, False]))
    if "init" in SPECS[op].allows:
        fields["init"] = draw(st.sampled_from([None, Init.DEFAULT, Init.ZERO]))
    return Node(id=name, op=op, inputs=inputs, **fields)  # type: ignore[arg-type]


def respelled(ir: BlueprintIR, seed: int) -> BlueprintIR:
    """The same graph with other ids, another topological order, and swapped commutative inputs."""
    rng = random.Random(seed)
    left, placed, order = list(ir.nodes), {INPUT}, []
    while left:
        ready = [n for n in left if set(n.inputs) <= placed]
        node = rng.choice(ready)
        left.remove(node)
        placed.add(node.id)
        order.append(node)
    names = {INPUT: INPUT} | {n.id: f"r{i}" for i, n in enumerate(rng.sample(order, len(order)))}
    nodes = []
    for n in order:
        inputs = [names[i] for i in n.inputs]
        if SPECS[n.op].commutative and rng.random() < 0.5:
            inputs.reverse()
        nodes.append(n.model_copy(update={"id": names[n.id], "inputs": tuple(inputs)}))
    return BlueprintIR(kind=ir.kind, name="another name", nodes=tuple(nodes),
                       output=names[ir.output])


@given(blueprints(), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_isomorphic_spellings_have_one_id(ir: BlueprintIR, seed: int) -> None:
    assert respelled(ir, seed).id == ir.id


@given(blueprints(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_change_of_meaning_changes_the_id(ir: BlueprintIR, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(ir.nodes) - 1))
    node = ir.nodes[place]
    changes: list[Node] = []
    if node.op in (Op.RELU, Op.GELU, Op.SILU):
        changes.append(node.model_copy(update={"op": Op.TANH}))
    if "init" in SPECS[node.op].allows:
        after = None if node.init is Init.ZERO else Init.ZERO
        changes.append(node.model_copy(update={"init": after}))
    if "bias" in SPECS[node.op].allows:
        changes.append(node.model_copy(update={"bias": not node.has_bias}))
    if node.kernel is not None:
        changes.append(node.model_copy(update={"kernel": 5}))
    for changed in changes:
        nodes = (*ir.nodes[:place], changed, *ir.nodes[place + 1:])
        assert ir.model_copy(update={"nodes": nodes}).id != ir.id


def _linear(name: str, source: str) -> Node:
    return Node(id=name, op=Op.LINEAR, inputs=(source,), out=C)


def _features(*nodes: Node) -> BlueprintIR:
    return BlueprintIR(kind=SiteKind.FEATURES, nodes=nodes, output=nodes[-1].id)


def test_one_parameter_used_twice_is_not_two_parameters() -> None:
    def add(a: str, b: str, name: str = "s") -> Node:
        return Node(id=name, op=Op.ADD, inputs=(a, b))

    shared = _features(_linear("a", "h"), add("a", "a"))
    apart = _features(_linear("a", "h"), _linear("b", "h"), add("a", "b"))
    assert shared.id != apart.id
    # Look-alike branches whose inner nodes are shared crosswise: only the wiring differs.
    def crossed(first: str, second: str) -> BlueprintIR:
        return _features(
            _linear("a", "h"), _linear("b", "h"), add("a", "b", "p"),
            Node(id="q", op=Op.MUL, inputs=(first, second)), add("p", "q"),
        )
    assert crossed("a", "b").id != crossed("a", "a").id
    assert crossed("a", "a").id == crossed("b", "b").id


@given(blueprints())
@settings(max_examples=100, deadline=None)
def test_json_round_trip(ir: BlueprintIR) -> None:
    assert parse_blueprint(ir.to_json()) == ir


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "1"),
        ({"surprise": 1}, "[Ee]xtra"),
        ({"output": "nowhere"}, "'nowhere' is not a node"),
        ({"nodes": [{"id": "a", "op": "softmax", "inputs": ["h"]}]}, "nodes.0.op"),
        ({"nodes": [{"id": "a", "op": "relu", "inputs": ["z"]}]}, "node 'a': input 'z'"),
        ({"nodes": [{"id": "a", "op": "relu", "inputs": ["h", "h"]}]}, "takes 1 inputs, got 2"),
        ({"nodes": [{"id": "a", "op": "linear", "inputs": ["h"]}]}, "needs ..out"),
        ({"nodes": [{"id": "a", "op": "relu", "inputs": ["h"], "heads": 2}]}, "does not take"),
        ({"nodes": [{"id": "a", "op": "relu", "inputs": ["h"]},
                    {"id": "b", "op": "relu", "inputs": ["h"]}], "output": "b"},
         "node 'a': does not reach"),
        ({"nodes": [{"id": "a", "op": "mean_pool", "inputs": ["h"]}]}, "not defined on features"),
    ],
)
def test_malformed_blueprints_are_refused_with_the_place_named(change: dict, words: str) -> None:
    good = json.loads(_features(Node(id="a", op=Op.RELU, inputs=("h",))).to_json())
    parse_blueprint(json.dumps(good))
    with pytest.raises(BlueprintError, match=words):
        parse_blueprint(json.dumps(good | change))


def test_an_oversized_blueprint_is_refused_unparsed() -> None:
    with pytest.raises(BlueprintError, match=f"at most {MAX_JSON_BYTES} bytes"):
        parse_blueprint("[" * (MAX_JSON_BYTES + 1))


@pytest.mark.parametrize("machine", type_tables, ids=lambda m: m.__name__)
def test_transition_tables_are_whole_and_the_only_law(machine: type) -> None:
    table = type_tables[machine]
    assert set(table) == set(machine)
    for before in machine:
        for after in machine:
            if after in table[before]:
                check(before, after)
            else:
                with pytest.raises(IllegalTransition, match=f"{before} -> {after}"):
                    check(before, after)


def test_the_tables_are_those_that_are_documented() -> None:
    page = Path(__file__).parents[2] / "docs/lifecycle.md"
    assert page.read_text() == as_markdown(), "print it again: python -m esper.leyline.lifecycle"


def test_every_seed_on_its_way_can_be_rolled_back() -> None:
    way = [SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING, SeedState.STABILIZATION,
           SeedState.EVALUATING, SeedState.FINE_TUNING, SeedState.FOSSILIZED]
    for before, after in pairwise(way):
        assert after in SEED_TRANSITIONS[before]
        assert SeedState.ROLLED_BACK in SEED_TRANSITIONS[before]


@given(blueprints(), st.sampled_from([(1, 3), (3, 5)]))
@settings(max_examples=60, deadline=None)
def test_inferred_shapes_are_what_the_reference_gives(
    ir: BlueprintIR, size: tuple[int, int]
) -> None:
    signature = SiteSignature(kind=ir.kind, channels=4)
    inferred = infer(ir, signature)
    params = initial_parameters(ir, signature)
    assert [tuple(p.shape) for p in params] == [p.shape for p in inferred.parameters]
    assert sum(p.numel() for p in params) == inferred.parameter_count
    h = torch.randn(signature.shape(*size))
    assert apply(ir, signature, h, params).shape == h.shape


@given(blueprints(SiteKind.TOKENS))
@settings(max_examples=40, deadline=None)
def test_at_a_causal_site_nothing_looks_ahead(ir: BlueprintIR) -> None:
    signature = SiteSignature(kind=SiteKind.TOKENS, channels=4, causal=True)
    params = [torch.randn_like(p) for p in initial_parameters(ir, signature)]
    h = torch.randn(2, 6, 4)
    changed = h.clone()
    changed[:, 4:] += 1.0
    before, after = (apply(ir, signature, x, params) for x in (h, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])


def test_widths_are_floors_in_lowest_terms() -> None:
    assert Width(times=2, over=8) == Width(times=1, over=4)
    assert [Width(times=1, over=4).at(c) for c in (3, 4, 11)] == [1, 1, 2]
    assert str(Width(times=2, plus=3)) == "2C+3"


def test_blend_keeps_the_unused_side_out() -> None:
    h, bad = torch.randn(5), torch.tensor([float("nan"), float("inf"), 1.0, 2.0, 3.0])
    assert torch.equal(blend(h, bad, torch.tensor(0.0)), h)
    assert torch.equal(blend(bad, h, torch.tensor(1.0)), h)
    a = torch.randn(4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for alpha in (0.0, 0.3, 1.0):
        assert torch.autograd.gradcheck(lambda x, y, w=alpha: blend(x, y, torch.tensor(w)), (a, b))


def test_standalone_signatures_are_others_and_the_old_ones_what_they_were() -> None:
    site = SiteSignature(kind=SiteKind.TOKENS, channels=4)
    # As it was before the field came: libraries from then must go on.
    assert site.id == "sig-134b6cf5f2a2cd9fd600bc2c2b9cc59d"
    assert "standalone" not in site.model_dump_json()
    alone = site.model_copy(update={"standalone": True})
    assert alone.id != site.id and "standalone" in str(alone)
    assert SiteSignature.model_validate_json(alone.model_dump_json()) == alone


def test_an_epsilon_is_part_of_the_meaning_and_its_default_is_not_spelled() -> None:
    def norm(eps: float | None) -> BlueprintIR:
        node = Node(id="n", op=Op.LAYER_NORM, inputs=("h",), eps=eps)
        return BlueprintIR(kind=SiteKind.TOKENS, nodes=(node,), output="n")

    assert norm(None).id == norm(1e-5).id != norm(1e-6).id
    site, h = SiteSignature(kind=SiteKind.TOKENS, channels=4), 1e-3 * torch.randn(1, 2, 4)
    params = [torch.ones(4), torch.zeros(4)]
    torch.testing.assert_close(
        apply(norm(1e-3), site, h, params), torch.nn.functional.layer_norm(h, (4,), eps=1e-3))
    with pytest.raises(ValueError, match="does not take"):
        Node(id="n", op=Op.RELU, inputs=("h",), eps=1e-3)
