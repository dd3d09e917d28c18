"""Optimizer surgery, over every optimizer and scheduler of torch: nothing stops training, and the
state of what was there stays bit-equal."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import esper.kasmina.growth as kasmina
from esper.errors import ContractError
from esper.kasmina.seed import Seed
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.optimizer import OptimizerSurgeon
from esper.tolaria.session import Session
from esper.urza.library import LocalLibrary
from tests.support import ReadyLoader, command, germinate, stir, to_full
from tests.tolaria.test_session import batches, loss_fn

ALL = {name: kind for name, kind in vars(torch.optim).items()
       if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
       and kind is not torch.optim.Optimizer}
REFUSED = {"LBFGS", "SparseAdam"}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
}
VARIANTS = [(name, options) for name in ALL if name not in REFUSED
            for options in [OPTIONS.get(name, {})]]
VARIANTS += [(name, {mode: True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")
             for mode in ("fused", "foreach")]


def host() -> nn.Module:
    """All matrices, for Muon takes nothing else."""
    return nn.Sequential(nn.Linear(16, 12, bias=False), nn.ReLU(),
                         nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 10, bias=False))


def frozen(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: frozen(v) for k, v in state.items()}
    return [frozen(v) for v in state] if isinstance(state, list) else state


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and a == b


class Watched:
    """A session whose optimizer is looked at around every event."""

    def __init__(self, make: Any, **options: Any) -> None:
        self.data, self.make, self.options = batches("mlp", 6), make, options
        self.session = self._session(None)

    def _session(self, resume: Path | None) -> Session:
        torch.manual_seed(0)
        model = host()
        kasmina.wrap(model, sites=["1", "3"], example=self.data[0][0])
        optimizer = self.make(model)
        options: dict[str, Any] = {"loss_fn": loss_fn, "holdout": self.data[:1]}
        options |= {k: v(model, optimizer) for k, v in self.options.items()}
        session = (Session(model, optimizer, **options) if resume is None
                   else Session.resume(resume, model, optimizer, **options))
        session.growth.graft_steps, session.growth.embargo_epochs = 3, 0
        return session

    def train(self, steps: int = 3) -> None:
        s = self.session
        for batch in self.data[:steps]:
            s.optimizer.zero_grad()
            loss = loss_fn(s.model, batch)
            loss.backward()
            s.optimizer.step()
            if s.parts.ema is not None:
                s.parts.ema.update_parameters(s.model)  # type: ignore[operator]
            assert s.step(loss)

    def once(self) -> None:
        trained = [p for g in self.session.optimizer.param_groups for p in g["params"]]
        assert len(trained) == len({id(p) for p in trained}), "a parameter is there twice"
        assert {id(p) for p in trained} == {
            id(p) for p in self.session.model.parameters() if p.requires_grad}
        assert set(self.session.optimizer.state) <= set(trained), "a state was left behind"
        names = [n for n, _ in self.session.model.named_parameters()]
        if self.session.parts.ema is not None:
            assert names == [n.removeprefix("module.") for n, _ in
                             self.session.parts.ema.named_parameters()]

    def event(self, act: Any) -> None:
        """`act` changes what is there, and no state of what stays."""
        before = {n: frozen(self.session.optimizer.state.get(p))
                  for n, p in self.session.model.named_parameters()}
        act()
        self.once()
        after = {n: self.session.optimizer.state.get(p)
                 for n, p in self.session.model.named_parameters()}
        common = before.keys() & after.keys()
        assert len(common) >= 3
        assert all(equal(before[n], after[n]) for n in common)

    def seed(self, site: str) -> Seed:
        seed = self.session.growth.sites[site].seed
        assert seed is not None
        return seed

    def germinate(self, site: str) -> None:
        bias = False if isinstance(self.session.optimizer, torch.optim.Muon) else None
        germinate(self.session.growth, site, ReadyLoader(bias=bias))
        assert self.seed(site).state is SeedState.TRAINING

    def order(self, action: Action, site: str) -> None:
        self.session.growth.obey(command(action, site))

    def full_life(self, tmp_path: Path) -> None:
        """Germinate, fossilize, germinate beside it, resume, cull, roll back; training between."""
        self.train()
        self.event(lambda: self.germinate("1"))
        self.train()
        assert all(p in self.session.optimizer.state or not self.session.optimizer.state
                   for p in self.seed("1").params), "what joined is trained"
        to_full(self.session.growth, "1")
        self.train()
        self.order(Action.ADVANCE, "1")
        self.event(lambda: self.order(Action.FOSSILIZE, "1"))
        self.train()
        self.event(lambda: self.germinate("3"))
        self.train()
        self.event(lambda: self.resume(tmp_path / "kept"))
        assert self.seed("3").state is SeedState.TRAINING
        assert len(self.session.growth.fossils()) == 1
        self.train()
        self.event(lambda: self.order(Action.CULL, "3"))
        self.train()
        self.session.epoch()
        good = {n: (frozen(p), frozen(self.session.optimizer.state.get(p)))
                for n, p in self.session.model.named_parameters()}
        self.germinate("3")
        self.train()
        stir(self.session.growth)
        self.session.optimizer.step()  # with a scaler, a loss without a step says nothing
        assert not self.session.step(torch.tensor(float("nan")))
        self.once()
        now = dict(self.session.model.named_parameters())
        assert now.keys() == good.keys()
        for name, (value, state) in good.items():
            assert equal(value, now[name].detach())
            assert equal(state, self.session.optimizer.state.get(now[name])), name
        self.train()
        self.session.close()

    def resume(self, path: Path) -> None:
        self.session.save(path).result()
        settings = [{k: frozen(v) for k, v in g.items() if k != "params"}
                    for g in self.session.optimizer.param_groups]
        self.session.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # there is no library
            self.session = self._session(path)
        again = [{k: v for k, v in g.items() if k != "params"}
                 for g in self.session.optimizer.param_groups]
        assert equal(dict(enumerate(settings)), dict(enumerate(again)))


@pytest.mark.parametrize(("name", "options"), VARIANTS,
                         ids=[f"{n}-{'-'.join(o) or 'plain'}" for n, o in VARIANTS])
def test_every_optimizer_goes_on_through_every_event(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    Watched(lambda model: ALL[name](model.parameters(), **options)).full_life(tmp_path)


def test_named_groups_and_rates_that_are_tensors(tmp_path: Path) -> None:
    Watched(lambda model: torch.optim.Adam(
        [{"params": list(model[0].named_parameters()), "weight_decay": 0.1},
         {"params": [*model[2].named_parameters("2"), *model[4].named_parameters("4")],
          "lr": torch.tensor(0.02)}], lr=torch.tensor(0.01))).full_life(tmp_path)


def test_the_average_and_the_scaler_follow(tmp_path: Path) -> None:
    Watched(lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            ema=lambda model, optimizer: AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
            scaler=lambda model, optimizer: torch.amp.GradScaler("cpu")).full_life(tmp_path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_who_cannot_take_new_parameters_says_so_before_the_first_step(
    name: str, tmp_path: Path
) -> None:
    model, data = host(), batches("mlp", 1)
    kasmina.wrap(model, sites=["1"], example=data[0][0])
    optimizer = ALL[name](model.parameters())
    with pytest.raises(ContractError, match=name):
        Session(model, optimizer, loss_fn=loss_fn, holdout=data, library=LocalLibrary(tmp_path))
    guarded = Session(model, optimizer, loss_fn=loss_fn, holdout=data)
    germinate(guarded.growth, "1")
    assert guarded.growth.sites["1"].state is SeedState.CULLED
    assert len(list(model.parameters())) == 3
    guarded.close()


def test_a_seed_that_muon_cannot_take_leaves_and_the_run_goes_on() -> None:
    seen: list[Any] = []
    model, data = host(), batches("mlp", 1)
    kasmina.wrap(model, sites=["1"], example=data[0][0])
    optimizer = torch.optim.Muon(model.parameters())
    session = Session(model, optimizer, loss_fn=loss_fn, holdout=data, observers=[seen.append])
    germinate(session.growth, "1")
    assert session.growth.sites["1"].state is SeedState.CULLED
    (reason,) = [t.trigger for t in seen if getattr(t, "after", None) is SeedState.CULLED]
    assert "could not be taken in: Muon takes matrices only" in reason and "[12]" in reason
    assert len(optimizer.param_groups) == 1 and len(list(model.parameters())) == 3
    session.close()


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: lrs.StepLR(o, 2), "multistep": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "constant": lambda o: lrs.ConstantLR(o, total_iters=3),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=20),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=20),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=4),
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9),
    "cyclic": lambda o: lrs.CyclicLR(o, 1e-3, 9e-3, step_size_up=5),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=9e-3, total_steps=40),
    "swa": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=8),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.ExponentialLR(o, 0.9)], [2]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o), lrs.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_schedule_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def rates(stop: int) -> Iterator[tuple[float, ...]]:
        watched = Watched(lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
                          scheduler=lambda model, optimizer: SCHEDULERS[name](optimizer),
                          lr_scale=lambda model, optimizer: 0.5)
        for step in range(12):
            if step == 3:
                germinate(watched.session.growth, "1")
            if step == stop:
                watched.resume(tmp_path / f"{name}-{stop}")
            watched.train(1)
            watched.session.scheduler.step()
            yield tuple(float(g["lr"]) for g in watched.session.optimizer.param_groups)
            last = watched.session.scheduler.get_last_lr()
            assert len(last) == len(watched.session.optimizer.param_groups)
        watched.session.close()

    plain = list(rates(-1))
    assert plain[-1][1] == pytest.approx(plain[-1][0] / 2)
    assert list(rates(7)) == plain


def test_a_rate_that_falls_on_plateaus_resumes(tmp_path: Path) -> None:
    watched = Watched(lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
                      scheduler=lambda m, o: lrs.ReduceLROnPlateau(o, patience=1))
    germinate(watched.session.growth, "1")
    for _ in range(2):
        watched.session.scheduler.step(1.0)
    watched.resume(tmp_path / "kept")
    watched.session.scheduler.step(1.0)
    assert [g["lr"] for g in watched.session.optimizer.param_groups] == pytest.approx([0.001] * 2)
    watched.session.close()


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_new_parameters_warm_up_and_no_schedule_notices(rate: Any) -> None:
    """Plain SGD moves a parameter by its rate times its gradient, which shows the rate."""
    old, new = (nn.Parameter(torch.zeros(1, 1)) for _ in range(2))
    optimizer = torch.optim.SGD([old], lr=rate, foreach=False)
    schedule = lrs.ExponentialLR(optimizer, 0.5)
    surgeon = OptimizerSurgeon(optimizer, schedule, lr_scale=0.5, warm_up=3)
    surgeon.join([new])
    moved = []
    for step in range(6):
        before = old.item(), new.item()
        for p in (old, new):
            p.grad = torch.ones_like(p)
        if step == 1:  # a step that fails half-way costs no rate
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        optimizer.step()
        moved.append((before[0] - old.item(), before[1] - new.item()))
        schedule.step()
    parts = [0.25, 0.5, 0.75, 1, 1, 1]
    for step, (of_old, of_new) in enumerate(moved):
        assert of_old == pytest.approx(0.1 * 0.5**step)
        assert of_new == pytest.approx(0.05 * 0.5**step * parts[step])
