"""Growth under autocast, and with a GradScaler that leaves steps out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.growth import growth_of
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.session import Session
from tests.kernels import Kernels
from tests.support import command

pytestmark = pytest.mark.slow
Batch = tuple[Tensor, Tensor]


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, 8, generator=generator)
    return x, (x[:, 0, 0] > x[:, 1, 0]).long() + 2 * (x[:, 2, 1] > 0).long()


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


class Run:
    """A loop under autocast, as the documentation of torch.amp has it."""

    def __init__(self, dtype: torch.dtype, scaler: Any = None, **settings: Any) -> None:
        self.dtype, self.model, self.scaler = dtype, Host(), scaler
        esper.wrap(self.model, sites=["first"], example=batch()[0])
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2, **settings)
        self.session = Session(self.model, self.optimizer, loss_fn=self.loss, holdout=[batch()],
                               scaler=scaler)
        self.growth = growth_of(self.model)
        self.growth.graft_steps = 24
        self.losses: list[float] = []

    def loss(self, model: nn.Module, data: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return F.cross_entropy(model(data[0]), data[1])

    def step(self, data: Batch) -> bool:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, data)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.losses.append(float(loss.detach()))
        return self.session.step(loss)

    def steps(self, count: int) -> None:
        for _ in range(count):
            assert self.step(batch())

    def command(self, action: Action) -> None:
        self.growth.obey(command(action, "first"))

    @property
    def state(self) -> SeedState:
        return self.growth.sites["first"].state

    def grow(self, kernels: Kernels) -> None:
        kernels.germinate(self.growth, "first")
        for state, steps in ((SeedState.TRAINING, 12), (SeedState.GRAFTING, 23)):
            self.steps(steps)
            assert self.state is state
            self.command(Action.ADVANCE) if state is SeedState.TRAINING else None
        self.step(batch())
        assert self.state is SeedState.STABILIZATION
        self.command(Action.ADVANCE)
        self.command(Action.FOSSILIZE)
        self.steps(12)
        (fossil,) = self.growth.fossils()
        assert fossil.failure is None and all(p.grad is not None for p in fossil.params)
        assert all(p.dtype is torch.float32 and p.isfinite().all() for p in fossil.params)
        grouped = [id(p) for g in self.optimizer.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in self.model.parameters())


def test_bfloat16(kernels: Kernels) -> None:
    run = Run(torch.bfloat16)
    run.grow(kernels)
    assert run.losses[-1] < 0.7 * run.losses[0] and run.session.rollbacks == 0
    assert not run.step((batch()[0] * float("inf"), batch()[1])), "nothing skips it: rolled back"
    run.session.close()


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["plain", "fused"])
def test_float16_with_a_scaler(kernels: Kernels, settings: dict[str, Any]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    run = Run(torch.float16, scaler, **settings)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    assert run.step(batch())
    assert scaler.get_scale() == 2.0**27, "this scale is too large, so the step was left out"
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert run.growth.step == 0 and run.session.rollbacks == 0, "no step, no explosion"
    while run.growth.step < 3:
        run.step(batch())
    run.losses.clear()
    run.grow(kernels)
    assert run.losses[-1] < 0.7 * run.losses[0] and run.session.rollbacks == 0
    run.session.close()


def test_an_overflow_amid_a_growth_culls_and_rolls_back_nothing(kernels: Kernels) -> None:
    run = Run(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    kernels.germinate(run.growth, "first")
    for _ in range(3):
        run.step(batch())
    run.command(Action.ADVANCE)
    x, y = batch()
    steps = run.growth.step
    for i in range(12):  # guards look at gradients every tenth step
        assert run.step((x * 1e6 if i % 2 else x, y))
        assert run.losses[-1] < 100 or i % 2
    assert any(loss != loss or loss > 100 for loss in run.losses)
    assert run.growth.step == steps + 6 and run.state is SeedState.GRAFTING
    assert all(p.isfinite().all() for p in run.model.parameters())
    scale = run.scaler.get_scale()
    summary = run.session.epoch()  # a snapshot of the scaler too
    assert summary.train_loss is not None and summary.train_loss < 100
    assert scale < 2.0**10
    run.session.close()
