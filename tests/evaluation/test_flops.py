"""What is counted for every arm, against torch's own counter and against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper.data.losses import squared_error
from esper.evaluation.flops import Cost, cost_of, counter, seed_cost
from esper.evaluation.meter import Meter
from esper.kasmina.growth import growth_of
from esper.leyline.command import Action
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.scores import Statistic, statistic_flops
from tests.support import HOSTS, command, germinate, to_full


def test_attention_and_grouped_convolutions_are_counted_by_what_they_do() -> None:
    b, heads, t, c = 2, 2, 6, 4
    q, k, v = (torch.randn(b, heads, t, c, requires_grad=True) for _ in range(3))
    product = 2 * b * heads * t * t * c
    with counter() as found:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.get_total_flops() == 2 * product
    with counter() as found:
        out.sum().backward()
    assert found.get_total_flops() == 5 * product  # the scores are computed again
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    with counter() as found:
        conv(x).sum().backward()
    assert found.get_total_flops() == 3 * (2 * 2 * 8 * 25 * 9), "each of its three passes the same"


def test_the_cost_of_a_model_is_in_proportion_to_its_samples_and_leaves_it_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = torch.randn(10, 6), torch.randn(10, 3)
    random_state = torch.get_rng_state()
    cost = cost_of(model, squared_error, batch)
    # The first layer's input needs no gradient.
    assert cost == Cost(10, 2 * 10 * (24 + 12), 2 * 10 * (2 * 24 + 3 * 12))
    assert cost.of(5, True) == cost.both // 2 and cost.of(20, False) == 2 * cost.forward
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def _loss(model: nn.Module, batch: tuple[Tensor, Any]) -> Tensor:
    return model(batch[0]).square().mean()


@pytest.mark.parametrize("host", HOSTS)
def test_a_grown_step_costs_what_torch_counts_on_the_exported_model(host: str) -> None:
    make, given, sites, causal = HOSTS[host]
    torch.manual_seed(0)
    model, batch = make(), (given(4), None)
    meter = Meter(model, _loss, batch)
    esper.wrap(model, sites=sites, example=given(2), causal=causal)
    growth = growth_of(model)
    growth.graft_steps = 2
    site = next(iter(growth.sites))
    germinate(growth, site)
    seed = growth.sites[site].seed
    assert seed is not None and seed.kernel is not None
    meter.watch(seed)
    assert meter.by["warm-up"] == meter.spent > 0
    to_full(growth, site)

    def of_a_step() -> int:
        before = meter.spent
        meter.loss(model, batch).backward()
        return meter.spent - before

    grown = esper.export(model)
    with counter() as seen:
        _loss(grown, batch).backward()
    assert of_a_step() == seen.get_total_flops() > meter.host.both
    if host != "transformer":  # torch's bare counter sees no attention on a CPU
        with FlopCounterMode(display=False) as bare:
            _loss(grown, batch).backward()
        assert bare.get_total_flops() == seen.get_total_flops()
    with torch.no_grad():
        before = meter.spent
        meter.loss(model, batch)
        held_out = meter.spent - before
    with torch.no_grad(), counter() as seen:
        _loss(grown, batch)
    assert held_out == seen.get_total_flops()


def test_a_seed_costs_what_it_runs_in_each_state() -> None:
    make, given, sites, _ = HOSTS["mlp"]
    model, batch = make(), (given(4), None)
    meter = Meter(model, _loss, batch)
    esper.wrap(model, sites=sites, example=given(2))
    growth = growth_of(model)
    site = sites[0]
    germinate(growth, site)
    seed = growth.sites[site].seed
    assert seed is not None and seed.kernel is not None
    meter.watch(seed)
    own = seed_cost(seed.kernel.ir, seed.site.signature, (4, 12))

    def spent(learning: bool = True) -> int:
        before = meter.spent
        with torch.set_grad_enabled(learning):
            meter.loss(model, batch)
        return meter.spent - before - (meter.host.both if learning else meter.host.forward)

    assert spent() == own.both, "in TRAINING it learns aside"
    assert spent(learning=False) == 0, "and is not run where nothing can learn"
    seed.forced = 0.1
    assert spent(learning=False) == own.forward, "a counterfactual runs it"
    seed.forced = 0.0
    assert spent(learning=False) == 0
    seed.forced = None
    growth.obey(command(Action.ADVANCE, site))
    growth.tick()
    assert spent() == own.both, "GRAFTING"
    with meter.unseen():
        meter.loss(model, batch)
    assert spent() == own.both
    before = meter.spent
    with meter.charging("statistics"):
        meter.loss(model, batch)
    assert meter.by["statistics"] == meter.spent - before and sum(meter.by.values()) == meter.spent
    growth.obey(command(Action.CULL, site))
    assert spent() == 0 and meter.by["training"] > 0, "what it has cost stays"


@pytest.mark.parametrize("kind", SiteKind)
def test_what_a_site_score_sums_up_costs_what_its_formula_says(kind: SiteKind) -> None:
    signature = SiteSignature(kind=kind, channels=6)
    h = torch.randn(signature.shape(900, 5))
    with counter() as seen:
        Statistic(signature).add(h, torch.randn_like(h))
    assert seen.get_total_flops() == statistic_flops(signature, h.numel() // 6)
