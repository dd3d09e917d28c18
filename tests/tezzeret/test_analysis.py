"""What static analysis lets through, and what it refuses, with the node named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import BlueprintError
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import (
    INPUT,
    BlueprintIR,
    C,
    Init,
    Node,
    Op,
    Width,
    parse_blueprint,
)
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.tezzeret.analysis import Budget, analyse
from esper.tezzeret.pipelines import choose_pipeline
from tests.leyline.test_contracts import blueprints, respelled
from tests.support import bottleneck

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=16)
ZERO = Init.ZERO


def blueprint(*nodes: Node) -> BlueprintIR:
    return BlueprintIR(kind=SiteKind.FEATURES, nodes=nodes, output=nodes[-1].id)


def linear(name: str, source: str, **more: object) -> Node:
    return Node(id=name, op=Op.LINEAR, inputs=(source,), out=C, **more)  # type: ignore[arg-type]


def add(a: str, b: str, name: str = "out") -> Node:
    return Node(id=name, op=Op.ADD, inputs=(a, b))


def test_a_residual_bottleneck_passes_with_its_figures() -> None:
    inferred = analyse(bottleneck(SiteKind.FEATURES), SIG)
    assert inferred.parameter_count == 16 * 8 + 8 + 8 * 16 + 16


@pytest.mark.parametrize(
    ("nodes", "node", "words"),
    [
        ([linear("a", "h")], "a", "not the input at birth"),
        ([linear("a", "h"), add("h", "a")], "out", "not the input at birth"),
        # The last bias learns, and with it the output moves; the weights before it never do.
        ([linear("a", "h", init=ZERO), linear("b", "a", init=ZERO), add("h", "b")],
         "a", "no gradient ever reaches a.weight"),
        ([linear("a", "h", init=ZERO, bias=False), linear("b", "a", init=ZERO, bias=False),
          add("h", "b")], "a", "no gradient ever reaches"),
        ([linear("a", "h", init=ZERO), linear("b", "h", init=ZERO),
          Node(id="m", op=Op.MUL, inputs=("a", "b")), add("h", "m")], "a", "no gradient"),
        ([linear("a", "h", init=ZERO), linear("b", "h"),
          Node(id="m", op=Op.MUL, inputs=("a", "b")), add("h", "m")], None, ""),
        ([linear("a", "h", init=ZERO), Node(id="t", op=Op.TANH, inputs=("a",)),
          Node(id="m", op=Op.MUL, inputs=("h", "t")), add("m", "h")], None, ""),
        ([linear("a", "h", init=ZERO), Node(id="t", op=Op.SIGMOID, inputs=("a",)),
          Node(id="m", op=Op.MUL, inputs=("h", "t")), add("m", "h")], "out",
         "not the input at birth"),
    ],
)
def test_birth_and_gradients(nodes: list[Node], node: str | None, words: str) -> None:
    if node is None:
        analyse(blueprint(*nodes), SIG)
        return
    with pytest.raises(BlueprintError, match=words) as refused:
        analyse(blueprint(*nodes), SIG)
    assert refused.value.node == node


WIDE = blueprint(
    Node(id="a", op=Op.LINEAR, inputs=("h",), out=Width(times=40)),
    linear("b", "a", init=ZERO), add("h", "b"),
)
FAN = blueprint(*(linear(f"x{i}", "h") for i in range(4)), add("x0", "x1", "s0"),
                add("s0", "x2", "s1"), add("s1", "x3", "s2"), linear("z", "s2", init=ZERO),
                add("h", "z"))


@pytest.mark.parametrize(
    ("ir", "budget", "node", "words"),
    [
        (WIDE, Budget(), "a", r"10880 parameters with this node, 21136 in all; .* is 4096"),
        (WIDE, Budget(parameters_per_cc=48), "b", "21136 parameters with this node, 21136 in all"),
        (WIDE, Budget(100, flops=20480), "b", "40960 FLOPs per sample with this node, 40976 in"),
        (WIDE, Budget(100, memory_bytes=4 * (10880 + 640)), "b",
         rf"{4 * (21136 + 656)} bytes of float32 per sample with this node"),
        (bottleneck(SiteKind.FEATURES), Budget(depth=3), "sum", "number 4 in a chain"),
        (FAN, Budget(width=4), "x3", r"5 values are needed at once after level 1 \(h, x0"),
    ],
)
def test_what_is_over_budget_is_refused_at_the_node_that_makes_it_so(
    ir: BlueprintIR, budget: Budget, node: str, words: str
) -> None:
    with pytest.raises(BlueprintError, match=words) as refused:
        analyse(ir, SIG, budget)
    assert refused.value.node == node


def test_memory_is_counted_in_the_type_of_the_site() -> None:
    half = SIG.model_copy(update={"dtype": DType.BFLOAT16})
    tight = Budget(100, memory_bytes=2 * (21136 + 672))
    analyse(WIDE, half, tight)
    with pytest.raises(BlueprintError, match="bytes of float32"):
        analyse(WIDE, SIG, tight)


@given(blueprints(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_kept_in_every_order_of_the_nodes_or_in_none(
    ir: BlueprintIR, seed: int
) -> None:
    signature = SiteSignature(kind=ir.kind, channels=4, standalone=True)

    def within(spelled: BlueprintIR, budget: Budget) -> bool:
        try:
            analyse(spelled, signature, budget)
        except BlueprintError as e:
            assert e.node is not None and e.node in {n.id for n in spelled.nodes} | {INPUT}
            return False
        return True

    for field, most in (("depth", len(ir.nodes)), ("width", len(ir.nodes) + 1)):
        assert within(ir, Budget(**{field: most}))
        least = next(n for n in range(most + 1) if within(ir, Budget(**{field: n})))
        again = respelled(ir, seed)
        assert within(again, Budget(**{field: least}))
        assert least == 0 or not within(again, Budget(**{field: least - 1}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "softmax"}, "Input should be 'linear'"),
        ({"shape": [3, 3]}, "[Ee]xtra"),  # shapes and types follow from the graph and the site;
        ({"dtype": "float64"}, "[Ee]xtra"),  # nobody can claim others
        ({"out": None}, "needs ..out"),
        ({"inputs": ["act"]}, "not listed before"),
    ],
)
def test_a_blueprint_that_is_malformed_is_refused_with_the_node_named(
    change: dict[str, object], words: str
) -> None:
    spelled = json.loads(bottleneck(SiteKind.FEATURES).to_json())
    spelled["nodes"][0].update(change)
    with pytest.raises(BlueprintError, match=words) as refused:
        parse_blueprint(json.dumps(spelled))
    assert refused.value.node == "down"


@pytest.mark.parametrize(
    ("interest", "load", "expected"),
    [
        (0.8, 0.0, Pipeline.AGGRESSIVE), (0.8, 0.29, Pipeline.AGGRESSIVE),
        (0.8, 0.3, Pipeline.STANDARD), (0.8, 0.9, Pipeline.STANDARD),
        (0.7, 0.0, Pipeline.STANDARD), (0.7, 0.49, Pipeline.STANDARD),
        (0.7, 0.5, Pipeline.FAST), (0.1, 0.9, Pipeline.FAST),
    ],
)
def test_the_choice_of_pipeline(interest: float, load: float, expected: Pipeline) -> None:
    assert choose_pipeline(interest, load) is expected


def test_a_standalone_blueprint_need_not_be_the_identity_at_birth() -> None:
    ir = BlueprintIR(kind=SIG.kind, nodes=(Node(id="n", op=Op.LINEAR, inputs=("h",), out=C),),
                     output="n")
    with pytest.raises(BlueprintError, match="not the input at birth"):
        analyse(ir, SIG)
    alone = SIG.model_copy(update={"standalone": True})
    assert analyse(ir, alone).parameter_count
    with pytest.raises(BlueprintError, match="budget"):
        analyse(ir, alone, Budget(depth=0))
