"""Both lowered halves, run as plain graphs in float64, equal eager and its gradients."""

from __future__ import annotations

import pytest
import torch

from esper.karn.templates import token_mixer
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.reference import apply, blend, initial_parameters
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.tezzeret.lower import lower


def chain(kind: SiteKind, *middle: Node) -> BlueprintIR:
    """h + zero(last(...(h)))"""
    last = middle[-1].id
    return BlueprintIR(
        kind=kind,
        nodes=(*middle, Node(id="up", op=Op.LINEAR, inputs=(last,), out=C, init=Init.ZERO),
               Node(id="sum", op=Op.ADD, inputs=("h", "up"))),
        output="sum",
    )


def unary(op: Op) -> list[Node]:
    return [Node(id="a", op=Op.LINEAR, inputs=("h",), out=Width(times=1, over=2)),
            Node(id="b", op=op, inputs=("a",))]


FEATURES, TOKENS, MAP = SiteKind.FEATURES, SiteKind.TOKENS, SiteKind.MAP
QKV = [Node(id=x, op=Op.LINEAR, inputs=("h",), out=C) for x in "qkv"]
CASES = {
    **{f"{op}": chain(FEATURES, *unary(op)) for op in
       (Op.RELU, Op.GELU, Op.SILU, Op.TANH, Op.SIGMOID, Op.LAYER_NORM, Op.RMS_NORM, Op.SCALE)},
    "mul": chain(FEATURES, *unary(Op.SILU), Node(id="g", op=Op.LINEAR, inputs=("h",),
                                                 out=Width(times=1, over=2), bias=False),
                 Node(id="m", op=Op.MUL, inputs=("b", "g"))),
    "attention": chain(TOKENS, *QKV, Node(id="t", op=Op.ATTENTION, inputs=("q", "k", "v"),
                                          heads=2)),
    "token_depthwise": chain(TOKENS, Node(id="d", op=Op.DEPTHWISE, inputs=("h",), kernel=3)),
    "token_pool": chain(TOKENS, Node(id="p", op=Op.MEAN_POOL, inputs=("h",))),
    "conv": chain(MAP, Node(id="c", op=Op.CONV, inputs=("h",), out=Width(times=1, over=2),
                            kernel=3)),
    "depthwise": chain(MAP, Node(id="d", op=Op.DEPTHWISE, inputs=("h",), kernel=5),
                       Node(id="n", op=Op.GROUP_NORM, inputs=("d",), groups=2)),
    "narrow_depthwise": chain(MAP, Node(id="d", op=Op.DEPTHWISE, inputs=("h",), kernel=3),
                              Node(id="r", op=Op.RELU, inputs=("d",))),
    "map_norms": chain(MAP, Node(id="n", op=Op.LAYER_NORM, inputs=("h",)),
                       Node(id="r", op=Op.RMS_NORM, inputs=("n",)),
                       Node(id="s", op=Op.SCALE, inputs=("r",))),
    "squeeze": chain(MAP, Node(id="p", op=Op.MEAN_POOL, inputs=("h",)),
                     Node(id="l", op=Op.LINEAR, inputs=("p",), out=C),
                     Node(id="m", op=Op.MUL, inputs=("h", "l"))),
}


# Causal sites are token sites, where positions are not pooled.
SITES = [(n, False, False) for n in CASES]
SITES += [("attention", True, False), ("token_depthwise", True, False), ("gelu", False, True)]
WAYS = [(*site, False) for site in SITES]
WAYS += [(n, causal, False, True) for n, causal, _ in SITES
         if CASES[n].kind is MAP or n == "token_depthwise"]


@pytest.mark.parametrize(("name", "causal", "standalone", "spelled_out"), WAYS)
def test_lowered_halves_equal_eager(
    name: str, causal: bool, standalone: bool, spelled_out: bool
) -> None:
    ir = CASES[name]
    signature = SiteSignature(kind=ir.kind, channels=8, dtype=DType.FLOAT64, causal=causal,
                              standalone=standalone)
    lowered = lower(ir, signature, spelled_out=spelled_out)
    generator = torch.Generator().manual_seed(0)
    for batch, space, alpha in ((16, 8, 0.3), (1, 5, 1.0), (7, 3, 0.0)):
        h = torch.randn(signature.shape(batch, space), dtype=torch.float64, generator=generator,
                        requires_grad=True)
        params = [torch.randn(p.shape, dtype=torch.float64, generator=generator,
                              requires_grad=True) for p in initial_parameters(ir, signature)]
        a = torch.tensor(alpha)
        out = apply(ir, signature, h, params)
        if not standalone:
            out = blend(h, out, a)
        grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        expected = torch.autograd.grad(out, [h, *params], grad)
        with torch.no_grad():
            inputs = [h, a, *params]
            outputs = lowered.forward.module(*inputs)

            def source(key: str, inputs: list = inputs, outputs: tuple = outputs,
                       grad: torch.Tensor = grad) -> torch.Tensor:
                kind, _, index = key.partition(":")
                return grad if kind == "grad" else (inputs if kind == "in" else outputs)[int(index)]

            got = lowered.backward.module(*map(source, lowered.backward_inputs))
        torch.testing.assert_close(outputs[0], out)
        assert outputs[0].data_ptr() != h.data_ptr()
        for index, want in zip(lowered.gradients, expected, strict=True):
            torch.testing.assert_close(got[index], want)


def test_weights_are_not_saved_twice() -> None:
    """What backward needs of the forward's inputs is taken from there."""
    lowered = lower(CASES["gelu"], SiteSignature(kind=FEATURES, channels=8))
    assert "in:2" in lowered.backward_inputs and "in:4" in lowered.backward_inputs
    assert sum(key.startswith("out:") for key in lowered.backward_inputs) <= 2


@pytest.mark.parametrize("name", ["gelu", "depthwise"])
def test_both_halves_are_lowered_where_the_site_is(name: str) -> None:
    """On torch's device without memory, in place of a GPU that is not here."""
    ir = CASES[name]
    site = SiteSignature(kind=ir.kind, channels=8).model_copy(update={"device": "meta"})
    lowered = lower(ir, site)
    for half in (lowered.forward, lowered.backward):
        assert {t.device.type for t in half.examples} == {"meta"}
        assert half.export().graph_module is not None


@pytest.mark.parametrize("spelled_out", [False, True])
def test_what_is_longer_than_the_input_by_its_padding_is_exported(spelled_out: bool) -> None:
    """The padded sequence is kept for the backward; its length is not that of any other tensor."""
    signature = SiteSignature(kind=TOKENS, channels=8)
    exported = lower(token_mixer(signature), signature, spelled_out=spelled_out).backward.export()
    assert exported.module() is not None


def test_spelling_out_leaves_no_call_but_that_of_a_dense_convolution() -> None:
    def calls(name: str) -> list[str]:
        signature = SiteSignature(kind=CASES[name].kind, channels=8)
        code = lower(CASES[name], signature, spelled_out=True).code
        return [line for half in code for line in half.splitlines() if "aten.convolution" in line]

    assert calls("narrow_depthwise") == calls("token_depthwise") == calls("squeeze") == []
    assert len(calls("conv")) == 2
