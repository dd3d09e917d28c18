"""Hosts that do unusual things: shared modules, several calls, checkpointing, hooks, parametrized
weights, frozen parts, other outputs than tensors. Kernels are plain torch here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import esper
from esper.errors import SiteError
from esper.kasmina.growth import Growth, growth_of
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.measure import host_flops, seed_flops
from esper.tolaria.scores import Statistic, activations, site_scores
from tests.support import command, germinate, mlp, stir, to_full

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))


def grown(model: nn.Module, *sites: str, state: SeedState, example: Any = X) -> Growth:
    """`model` with a seed at each site, moved away from its birth, in `state`."""
    esper.wrap(model, sites=list(sites), example=example)
    growth = growth_of(model)
    growth.graft_steps = 4
    for site in growth.sites:
        germinate(growth, site)
    ticks = {SeedState.TRAINING: 0, SeedState.GRAFTING: 2, SeedState.STABILIZATION: 4}[state]
    for site in growth.sites if ticks else ():
        growth.obey(command(Action.ADVANCE, site))
    for _ in range(ticks):
        growth.tick()
    assert {s.state for s in growth.active()} == {state}
    stir(growth)
    return growth


def learnt(model: nn.Module, growth: Growth, x: Any = X) -> dict[str, Tensor]:
    """Gradients of host and seeds, by name."""
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(s.failure is None for s in growth.active())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


STATES = pytest.mark.parametrize(
    "state", [SeedState.TRAINING, SeedState.GRAFTING, SeedState.STABILIZATION])


class Twice(nn.Module):
    """A block that is called twice; `apart` makes two of it with the same weights."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.again = copy.deepcopy(self.block) if apart else self.block
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.block(x)))


@STATES
def test_a_module_called_twice_gathers_the_gradients_of_both_calls(state: SeedState) -> None:
    """As two copies of it with equal weights and equal seeds would, added up."""
    shared, apart = Twice(), Twice(apart=True)
    one, two = grown(shared, "block", state=state), grown(apart, "block", "again", state=state)
    first, second = two.active()
    with torch.no_grad():
        for mine, a, b in zip(one.active()[0].params, first.params, second.params, strict=True):
            a.copy_(mine), b.copy_(mine)
    torch.testing.assert_close(shared(X), apart(X))
    got, want = learnt(shared, one), learnt(apart, two)
    seeds = [p.grad + q.grad for p, q in zip(first.params, second.params, strict=True)]
    torch.testing.assert_close([p.grad for p in one.active()[0].params], seeds)
    torch.testing.assert_close(got["block.0.weight"],
                               want["block.0.weight"] + want["again.0.weight"])
    torch.testing.assert_close(got["head.weight"], want["head.weight"])
    torch.testing.assert_close(esper.export(shared)(X), shared(X))
    esper.unwrap(shared)
    assert torch.equal(shared(X), Twice()(X))


def test_drift_of_a_module_called_twice_is_that_of_its_worse_call() -> None:
    model = Twice()
    (seed,) = grown(model, "block", state=SeedState.STABILIZATION).active()
    drifts = []

    def measure(module: nn.Module, args: Any, output: Tensor) -> None:
        h = model.block[1](model.block[0](args[0]))
        drifts.append(float(((output - h).norm() / h.norm()).detach()))

    model.block.register_forward_hook(measure)
    seed.sample_health()
    model(X)
    assert len(drifts) == 2 and drifts[0] != pytest.approx(drifts[1])
    assert seed.health().drift == pytest.approx(max(drifts))
    model(X)
    assert seed.health().drift is None, "it was not asked for again"


def test_figures_count_every_call() -> None:
    once, twice = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), Twice()
    (one,) = grown(once, "0", state=SeedState.STABILIZATION).active()
    growth = grown(twice, "block", state=SeedState.STABILIZATION)
    assert seed_flops(growth.active()[0]) == 2 * seed_flops(one)
    apart = Twice(apart=True)
    other = grown(apart, "block", "again", state=SeedState.TRAINING)
    esper.unwrap(twice)
    esper.wrap(twice, sites=["block"], example=X)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    score = site_scores(twice, growth_of(twice), loss, [X])["block"]
    both = Statistic(growth_of(twice).sites["block"].found.signature)
    for _, h, g in activations(apart, other, loss, X, ["block", "again"]):
        both.add(h, g * len(h))
    assert score == pytest.approx(both.score()) and score > 0
    assert host_flops(twice, {"x": X}) == host_flops(apart, X)


def test_a_module_with_two_names_is_one_site() -> None:
    model = Twice()
    growth = grown(model, "again", "bl*", state=SeedState.STABILIZATION)
    assert list(growth.sites) == ["block"]
    assert {"block.esper1_up_weight", "again.esper1_up_weight"} <= set(model.state_dict())
    assert len(dict(model.named_parameters())) == 4 + len(growth.active()[0].params)
    plain = esper.export(model)
    assert plain.block is plain.again
    torch.testing.assert_close(plain(X), model(X))


def test_an_activation_used_in_several_places_is_not_suggested_but_may_be_named() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))
    (said,) = [s for s in esper.suggest_sites(model, X) if s.name == "1"]
    assert not said.suitable and "called 2 times" in said.reason
    growth = grown(model, "1", state=SeedState.STABILIZATION)
    torch.testing.assert_close(esper.export(model)(X), model(X))
    assert learnt(model, growth)["1.esper1_up_weight"].abs().sum() > 0


class Checkpointed(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head, self.run = nn.Linear(8, 3), run

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


@STATES
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_learns_as_one_that_is_not(state: SeedState, reentrant: bool) -> None:
    def again(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    models = [Checkpointed(lambda block, x: block(x)), Checkpointed(again)]
    got = [learnt(m, grown(m, "blocks.*", state=state)) for m in models]
    assert got[0].keys() == got[1].keys() and any("esper" in n for n in got[0])
    torch.testing.assert_close(got[1], got[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_scores_under_checkpointing(reentrant: bool, caplog: pytest.LogCaptureFixture) -> None:
    def again(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    plain, model = Checkpointed(lambda block, x: block(x)), Checkpointed(again)
    for host in (plain, model):
        esper.wrap(host, sites=["blocks.*"], example=X)
    want = site_scores(plain, growth_of(plain), loss, [X])
    got = site_scores(model, growth_of(model), loss, [X])
    if reentrant:  # torch does not differentiate through it in parts
        assert got == {} and "use_reentrant=False" in caplog.text
    else:
        assert got == pytest.approx(want) and not caplog.text


def test_a_site_behind_frozen_layers_has_the_score_of_any_other() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 3))
    esper.wrap(model, sites=["0"], example=X)
    free = site_scores(model, growth_of(model), loss, [X])
    model.requires_grad_(False)
    assert site_scores(model, growth_of(model), loss, [X]) == free != {}


@pytest.mark.parametrize("frozen", ["below", "at", "above", "all"])
@STATES
def test_frozen_parts_do_not_keep_a_seed_from_learning(frozen: str, state: SeedState) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 12),
                          nn.ReLU(inplace=True), nn.Linear(12, 3))
    free = copy.deepcopy(model)
    parts = {"below": [0], "at": [2], "above": [4], "all": [0, 2, 4]}[frozen]
    for part in parts:
        model[part].requires_grad_(False)
    want = learnt(free, grown(free, "2", state=state))
    got = learnt(model, grown(model, "2", state=state))
    assert not any(n.startswith(f"{part}.") and "esper" not in n for n in got for part in parts)
    torch.testing.assert_close(got, {n: want[n] for n in got})
    assert all(n in got for n in want if "esper" in n)


def test_hooks_of_others_keep_their_place() -> None:
    """One before the seed and one after it, in the host, in a copy, in an export, and later."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    esper.wrap(model, sites=["0"], example=X)
    growth = growth_of(model)
    germinate(growth, "0")
    model[0].register_forward_hook(lambda module, args, output: torch.sin(output))
    to_full(growth, "0")
    stir(growth)
    (seed,) = growth.active()
    assert seed.kernel is not None
    h = nn.functional.linear(X, model[0].weight, model[0].bias) * 2
    want = model[1](torch.sin(seed.kernel.kernel(h, seed.params, 1.0, 2)))
    torch.testing.assert_close(model(X), want)
    torch.testing.assert_close(esper.export(model)(X), want)
    torch.testing.assert_close(copy.deepcopy(model)(X), want)
    torch.testing.assert_close(model(X), want, msg="an export leaves the host as it is")
    esper.unwrap(model)
    assert len(model[0]._forward_hooks) == 2
    torch.testing.assert_close(model(X), model[1](torch.sin(h)))


def test_backward_hooks_see_the_gradient_at_the_grown_output() -> None:
    model, seen = mlp(), []
    x = torch.randn(3, 16)
    growth = grown(model, "1", state=SeedState.STABILIZATION, example=x)
    model[1].register_full_backward_hook(lambda module, given, got: seen.append(got[0]))
    out = model(x)
    (want,) = torch.autograd.grad(model[2:](h := model[1](model[0](x))).square().sum(), h)
    out.square().sum().backward()
    torch.testing.assert_close(seen[-1], want)
    assert growth.active()[0].params[0].grad is not None


def test_a_model_that_cannot_be_copied_says_so() -> None:
    import threading

    model = mlp()
    x = torch.randn(3, 16)
    grown(model, "1", state=SeedState.STABILIZATION, example=x)
    model.lock = threading.Lock()
    with pytest.raises(SiteError, match=r"cannot be copied.*lock"):
        esper.export(model)


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm,
                                  parametrizations.orthogonal], ids=lambda f: f.__name__)
def test_parametrized_weights(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(8, 8)), nn.ReLU(), make(nn.Linear(8, 8)), nn.Linear(8, 3))
    names = list(model.state_dict())
    assert {s.name for s in esper.suggest_sites(model, X) if s.suitable} == {"1"}
    with pytest.raises(SiteError, match="computes a weight"):
        esper.wrap(model, sites=["0.parametrizations.weight.*"], example=X)
    growth = grown(model, "0", "2", state=SeedState.STABILIZATION)
    got = learnt(model.train(), growth)
    assert sum("esper" in n for n in got) == 2 * len(growth.active()[0].params)
    model.eval()
    torch.testing.assert_close(esper.export(model)(X), model(X))
    esper.unwrap(model)
    assert list(model.state_dict()) == names
    esper.wrap(model, sites=["0"], kind="features")


@dataclass
class Result:
    loss: Tensor | None
    hidden: Tensor


class Block(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda h: (h, None), lambda out: out[0]),
    "list": (lambda h: [h, h.sum()], lambda out: out[0]),
    "dict": (lambda h: {"loss": h.sum(), "hidden": h}, lambda out: out["hidden"]),
    "dataclass": (lambda h: Result(None, h), lambda out: out.hidden),
}


@STATES
@pytest.mark.parametrize("output", OUTPUTS)
def test_modules_that_return_more_than_a_tensor(output: str, state: SeedState) -> None:
    make, take = OUTPUTS[output]

    class Host(nn.Module):
        def __init__(self, block: nn.Module, take: Callable[[Any], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block, self.head, self.take = block, nn.Linear(8, 3), take

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.take(self.block(x)))

    model = Host(Block(make), take)
    plain = Host(Block(lambda h: h), lambda out: out)
    plain.load_state_dict(model.state_dict())
    want = learnt(plain, grown(plain, "block", state=state))
    torch.testing.assert_close(learnt(model, grown(model, "block", state=state)), want)
    torch.testing.assert_close(esper.export(model)(X), model(X))
