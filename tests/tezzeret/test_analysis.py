"""What static analysis lets through, and what it refuses, with the node named."""

from __future__ import annotations

import pytest

from esper.errors import BlueprintError
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.analysis import Budget, analyse
from esper.tezzeret.pipelines import choose_pipeline
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


def test_budgets_name_the_figure() -> None:
    wide = blueprint(
        Node(id="a", op=Op.LINEAR, inputs=("h",), out=Width(times=40)),
        linear("b", "a", init=ZERO), add("h", "b"),
    )
    with pytest.raises(BlueprintError, match=r"21136 parameters, the budget at .* is 4096"):
        analyse(wide, SIG)
    with pytest.raises(BlueprintError, match=r"4 nodes in a chain, .* is 3"):
        analyse(bottleneck(SiteKind.FEATURES), SIG, Budget(depth=3))


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
