"""`Trainer.fit`: the loop around a session, for people without one of their own."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.tolaria.measure import LossFn
from esper.tolaria.session import EpochSummary, Session


class Trainer:
    """Trains a model for some epochs. With `session=None` it is the plain loop, no more.

    Args:
        batches: iterated once per epoch; a DataLoader, say.
        loss_fn: (model, batch) -> scalar loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        batches: Iterable[Any],
        session: Session | None = None,
        scheduler: Any = None,
    ) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.batches, self.session, self.scheduler = batches, session, scheduler
        self.step_seconds = array("d")  # wall time of every step, session included

    def fit(
        self,
        epochs: int,
        on_epoch: Callable[[int, EpochSummary | None, float], None] | None = None,
    ) -> None:
        """Train. `on_epoch` is called with (epoch, the session's summary, mean train loss)."""
        for epoch in range(1, epochs + 1):
            self.model.train()
            good_losses: list[Tensor] = []
            for batch in self.batches:
                started = time.perf_counter()
                self.optimizer.zero_grad(set_to_none=True)
                loss = self.loss_fn(self.model, batch)
                loss.backward()
                self.optimizer.step()
                good = self.session.step(loss) if self.session is not None else True
                self.step_seconds.append(time.perf_counter() - started)
                if good:
                    good_losses.append(loss.detach())
            if self.scheduler is not None:
                self.scheduler.step()
            summary = self.session.epoch() if self.session is not None else None
            if on_epoch is not None:
                # Summed up here: looking at each loss would make the host wait at every step.
                mean = float(torch.stack(good_losses).mean()) if good_losses else float("nan")
                on_epoch(epoch, summary, mean)
