"""Matching: what a module computes decides, not who wrote it or what it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.leyline.reference import apply
from esper.leyline.signature import SiteKind
from esper.nn.trace import fold, match, tensors
from esper.nn.values import NoMatch
from tests.nn import modules as other

FEATURES, TOKENS, MAPS = (5, 8), (3, 6, 8), (2, 8, 5, 7)
MATCHING: dict[str, tuple[nn.Module, tuple[int, ...], SiteKind]] = {
    "bottleneck": (esper.nn.Bottleneck(8, 3), TOKENS, SiteKind.TOKENS),
    "bottleneck on features": (esper.nn.Bottleneck(8, 3), FEATURES, SiteKind.FEATURES),
    "gated mlp": (esper.nn.GatedMLP(8, 20), TOKENS, SiteKind.TOKENS),
    "gated mlp with bias": (esper.nn.GatedMLP(8, 20, bias=True), FEATURES, SiteKind.FEATURES),
    "low rank": (esper.nn.LowRank(8, 2), TOKENS, SiteKind.TOKENS),
    "depthwise": (esper.nn.DepthwiseBlock(8, 5, groups=2), MAPS, SiteKind.MAP),
    "squeeze excite": (esper.nn.SqueezeExcite(8, 4), MAPS, SiteKind.MAP),
    "attention": (esper.nn.Attention(8, 2), TOKENS, SiteKind.TOKENS),
    "causal attention": (esper.nn.Attention(8, 4, causal=True), TOKENS, SiteKind.TOKENS),
    "a stranger's mlp": (
        nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), TOKENS, SiteKind.TOKENS),
    "in place inside": (
        nn.Sequential(nn.Linear(8, 9), nn.ReLU(inplace=True), nn.Linear(9, 8)), FEATURES,
        SiteKind.FEATURES),
    "llama's mlp": (other.LlamaMLP(8, 12), TOKENS, SiteKind.TOKENS),
    "torch's rms norm": (
        nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), TOKENS, SiteKind.TOKENS),
    "convnext": (other.ConvNeXtBlock(8), MAPS, SiteKind.MAP),
    "squeeze excite on [B, C]": (other.FlatSqueezeExcite(8), MAPS, SiteKind.MAP),
    "transformer block": (other.TransformerBlock(8, 2), TOKENS, SiteKind.TOKENS),
    "channels last, any rank": (
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU()), (2, 3, 4, 5, 8),
        SiteKind.FEATURES),
    "linear over a map's last axis": (
        nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8)), (2, 3, 4, 8),
        SiteKind.FEATURES),
    "residual convolutions": (
        nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 8, 1)), MAPS,
        SiteKind.MAP),
}


@pytest.mark.parametrize("name", MATCHING)
def test_a_match_computes_the_same(name: str) -> None:
    """In float64, so that nothing but the meaning is compared; every gradient too."""
    module, shape, kind = MATCHING[name]
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    module = module.double()
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = match(module, h.detach())
    assert (found.signature.kind, found.signature.channels) == (kind, 8)
    assert found.signature.standalone and not found.only_eval
    assert sorted(w.path for w in found.weights) == sorted(n for n, _ in module.named_parameters())
    out = apply(found.ir, found.signature, fold(h, found.flat), tensors(module, found.weights))
    truth = module(h)
    leaves = [h, *module.parameters()]
    gradient = torch.randn_like(h)
    torch.testing.assert_close(out.view_as(h), truth)
    for ours, theirs in zip(torch.autograd.grad(out.view_as(h), leaves, gradient),
                            torch.autograd.grad(truth, leaves, gradient), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_causal_attention_is_a_causal_site() -> None:
    assert match(esper.nn.Attention(8, 2, causal=True), torch.zeros(TOKENS)).signature.causal
    assert not match(esper.nn.Attention(8, 2), torch.zeros(TOKENS)).signature.causal


def test_one_graph_is_one_blueprint_whoever_wrote_it() -> None:
    theirs = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    example = torch.zeros(MAPS)
    assert match(theirs, example).key == match(Written(), example).key


def conv(**how: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, **how), nn.ReLU())


def mlp(*inside: nn.Module, out: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *inside, nn.Linear(8, out))


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "batch norm": (mlp(nn.BatchNorm1d(8)), FEATURES, r"1 \(BatchNorm1d\)"),
    "an unknown activation": (mlp(nn.Hardswish()), FEATURES, r"1 \(Hardswish\)"),
    "gelu by tanh": (mlp(nn.GELU(approximate="tanh")), FEATURES, "approximate='tanh'"),
    "another width": (mlp(nn.ReLU(), out=10), FEATURES, "10 channels.*8 channels"),
    "stride": (conv(stride=2, padding=1), MAPS, "stride"),
    "no padding": (conv(), MAPS, "padding 1"),
    "circular padding": (conv(padding=1, padding_mode="circular"), MAPS, "circular"),
    "groups": (conv(padding=1, groups=2), MAPS, "2 groups"),
    "control flow": (other.Branching(), FEATURES, "control flow"),
    "two inputs": (other.TwoInputs(), FEATURES, "x, y"),
    "one layer": (nn.Sequential(nn.Linear(8, 8)), FEATURES, "single operation"),
    "the input itself": (nn.Sequential(nn.Identity(), nn.Identity()), FEATURES, "input"),
    "in place on the input": (
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), FEATURES, "in place"),
    "multihead": (
        nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), TOKENS, "MultiheadAttention"),
    "no affine": (mlp(nn.LayerNorm(8, elementwise_affine=False)), FEATURES, "no weight"),
    "rank 1": (mlp(nn.ReLU()), (8,), "rank 1"),
    "norm over two axes": (
        nn.Sequential(nn.LayerNorm((6, 8)), nn.Linear(8, 8)), TOKENS, "last 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_what_is_at_fault(name: str) -> None:
    module, shape, reason = REFUSED[name]
    with pytest.raises(NoMatch, match=reason):
        match(module, torch.zeros(shape))


def test_integers_and_mixed_types_are_refused() -> None:
    with pytest.raises(NoMatch, match="int64"):
        match(mlp(nn.ReLU()), torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(NoMatch, match=r"Double|float64"):
        match(mlp(nn.ReLU()).double(), torch.zeros(5, 8))


def test_what_differs_in_training_is_for_evaluation_only() -> None:
    dropped = match(mlp(nn.ReLU(), nn.Dropout(0.25)), torch.zeros(FEATURES))
    assert "dropout of 0.25" in dropped.only_eval
    assert "dropout_p" in match(other.TransformerBlock(8, 2, 0.1), torch.zeros(TOKENS)).only_eval
    assert "in training" in match(other.Moody(), torch.zeros(FEATURES)).only_eval
    assert not match(mlp(nn.ReLU(), nn.Dropout(0.0)), torch.zeros(FEATURES)).only_eval


def test_matching_leaves_the_module_alone() -> None:
    module = mlp(nn.ReLU(), nn.Dropout(0.5)).train()
    module[1].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    state = torch.get_rng_state()
    match(module, torch.zeros(FEATURES))
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [m.training for m in module.modules()]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert "forward" not in module.__dict__


def test_inner_hooks_and_parametrizations_are_refused() -> None:
    hooked = mlp(nn.ReLU())
    hooked[1].register_forward_hook(lambda m, a, out: None)
    with pytest.raises(NoMatch, match="1 has hooks"):
        match(hooked, torch.zeros(FEATURES))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU())
    with pytest.raises(NoMatch, match="parametrized"):
        match(normed, torch.zeros(FEATURES))
