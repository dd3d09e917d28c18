"""The peer: GroMo's own classes, at the fixed grower's places and times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.errors import ContractError
from esper.evaluation import arms, gromo
from esper.evaluation.arms import train
from esper.evaluation.fixed import FixedGrower
from esper.evaluation.gromo import GromoGrower
from esper.evaluation.meter import Meter
from esper.leyline.signature import SiteKind, SiteSignature
from tests.evaluation.support import experiment


def _needs_gromo() -> None:
    if reason := gromo.why_not():
        pytest.skip(reason)


def test_without_the_package_the_arm_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gromo.importlib.util, "find_spec", lambda name: None)
    assert gromo.why_not() == "the package gromo is not installed here"
    monkeypatch.setattr(arms, "why_not", gromo.why_not)
    with pytest.raises(ContractError, match="gromo is not installed"):
        train(experiment(), "gromo", 0)


def test_it_grows_where_and_when_the_fixed_grower_does_and_pays_for_its_statistics() -> None:
    _needs_gromo()
    made = experiment()
    run, fixed = train(made, "gromo", 1), train(made, "fixed", 1)
    assert [(e["epoch"], e["site"]) for e in run["events"]] == [(2, "act"), (4, "act")]
    assert all(0 < e["neurons"] <= 16 for e in run["events"])
    assert run["flops"]["statistics"] > 0 and run["budget"] == fixed["budget"]
    assert run["rows"][-1]["parameters"] <= fixed["rows"][-1]["parameters"]
    assert run["rows"][-1]["flops"] >= run["budget"]
    assert run["rows"][1]["loss"] == fixed["rows"][1]["loss"], "until it grows, one run"


SITES = {
    SiteKind.FEATURES: (nn.Linear(6, 8), (6,)), SiteKind.TOKENS: (nn.Linear(6, 8), (5, 6)),
    SiteKind.MAP: (nn.Conv2d(6, 8, 3, padding=1), (6, 5, 5)),
}


@pytest.mark.parametrize("kind", SITES)
def test_every_kind_of_site_grows_and_all_of_it_learns(kind: SiteKind) -> None:
    _needs_gromo()
    torch.manual_seed(0)
    layer, shape = SITES[kind]
    model = nn.Sequential(layer)
    x = torch.randn(12, *shape)
    y = torch.relu(model(x).detach()) * 3

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    signature = SiteSignature(kind=kind, channels=8)
    due = FixedGrower(model, optimizer, ["0"], lambda site: nn.Identity(), 2, 1, 1).due
    meter = Meter(model, loss, (x, y))
    grower = GromoGrower(model, optimizer, due, {"0": signature}, {"0": 300}, [(x, y)], loss, meter)
    for epoch in (1, 2):
        before = loss(model, (x, y)).item()
        assert grower.end_of_epoch(epoch) > 0
        assert loss(model, (x, y)).item() < before, "its neurons lower the loss at once"
        meter.grown(model)
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
    assert grower.end_of_epoch(3) == 0
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.grad is not None and p in optimizer.state for p in model.parameters())
