"""A run that grows by a script, with everything in it that a checkpoint has to hold.

Also a program, for the test that kills it:  python -m tests.tolaria.runs FOLDER LIBRARY KILL_AT
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import esper.kasmina.growth as kasmina
import esper.tolaria.library as link
from esper.leyline.command import Action
from esper.tamiyo.state import Catalog, Decision, SystemState
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.session import Session
from esper.tolaria.trainer import Trainer
from esper.urza.library import LocalLibrary
from tests.support import ReadyLoader, ResidualBlock, command

EPOCHS, STEPS = 8, 6
# By epoch. Seed 2 goes all the way; seed 3 is blended in beside it and culled.
SCRIPT: dict[int, list[tuple[Action, str]]] = {
    1: [(Action.GERMINATE, "2")],
    2: [(Action.ADVANCE, "2"), (Action.GERMINATE, "3")],
    3: [(Action.ADVANCE, "3")],
    4: [(Action.ADVANCE, "2")],
    5: [(Action.ADVANCE, "2")],
    6: [(Action.FOSSILIZE, "2"), (Action.CULL, "3")],
    7: [(Action.GERMINATE, "2")],
}


class Remembering:
    """Commands by epoch, from a state of its own."""

    def __init__(self) -> None:
        self.waiting = dict(SCRIPT)

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        return Decision(tuple(command(a, s) for a, s in self.waiting.pop(state.epoch, [])))

    def state_dict(self) -> dict[str, Any]:
        return {"left": [(e, [(str(a), s) for a, s in c]) for e, c in self.waiting.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = {e: [(Action(a), s) for a, s in c] for e, c in state["left"]}


class Noise(nn.Module):
    """Draws from all three random generators."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x + 0.01 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * np.random.rand()


class Run:
    """`losses` are those of every training step, exact to the last bit, in hexadecimal."""

    def __init__(self, library: Path, folder: Path | None, resume: Path | None = None) -> None:
        torch.manual_seed(0 if resume is None else 99)  # a resumed run must not depend on it
        random.seed(0 if resume is None else 99)
        np.random.seed(0 if resume is None else 99)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), ResidualBlock(8), ResidualBlock(8), Noise(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 10))
        kasmina.wrap(self.model, sites=["2", "3"], example=torch.randn(2, 1, 8, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=EPOCHS)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        kept = None if folder is None else Checkpoints(
            folder, every_steps=1, every_epochs=1, keep=1000)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(8 * (STEPS + 1), 1, 8, 8, generator=generator)
        y = torch.randint(0, 10, (len(x),), generator=generator)
        options: dict[str, Any] = {
            "loss_fn": self.loss, "holdout": [(x[:8], y[:8])], "policy": Remembering(),
            "library": LocalLibrary(library), "scheduler": self.scheduler, "ema": self.ema,
            "checkpoints": kept, "reproducible": True, "lr_scale": 0.5, "warm_up": 5,
        }
        self.losses: list[str] = []
        self.states: list[tuple[str, ...]] = []
        self.kill_at, self.nan_at, self.said = -1, -1, False
        self.session: Session
        with ready_kernels():
            if resume is None:
                self.session = Session(self.model, self.optimizer, **options)
            else:
                self.session = Session.resume(resume, self.model, self.optimizer, **options)
        self.session.growth.graft_steps, self.session.growth.embargo_epochs = 8, 1
        # Shuffled by torch's own global generator, as people do.
        data = DataLoader(TensorDataset(x[8:], y[8:]), batch_size=8, shuffle=True)
        self.trainer = Trainer(self.model, self.optimizer, self.loss, data, self.session,
                               self.scheduler)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if hasattr(self, "session") and self.session.checkpoints is not None:
            self.session.checkpoints.wait()  # so that every step and epoch has its checkpoint
        if model.training:
            if self.session.growth.step == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.ema.update_parameters(model)
            self.losses.append(f"{self.session.growth.step} {float(loss.detach()).hex()}")
            if self.said:
                print(self.losses[-1], flush=True)
            self.states.append(tuple(s.state for s in self.session.growth.sites.values()))
            if self.session.growth.step == self.nan_at:
                self.nan_at = -1  # once
                return loss * float("nan")
        return loss

    def go(self, epochs: int = EPOCHS) -> Run:
        self.trainer.fit(epochs)
        self.session.close()
        return self

    def end(self) -> dict[str, Tensor]:
        """Everything that a run leaves behind."""
        return {**{f"model.{k}": v for k, v in self.model.state_dict().items()},
                **{f"ema.{k}": v for k, v in self.ema.state_dict().items()}}


@contextlib.contextmanager
def ready_kernels(loader: Any = None) -> Iterator[None]:
    """Sessions made inside find every kernel, at once; or as `loader` does."""
    real = link.Loader
    link.Loader = lambda library: loader or ReadyLoader()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        link.Loader = real  # type: ignore[misc]


if __name__ == "__main__":
    folder, library, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    run = Run(library, folder, folder if folder.exists() else None)
    run.kill_at = kill_at
    run.said = True
    run.go()
