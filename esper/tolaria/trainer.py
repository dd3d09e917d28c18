"""`Trainer.fit`: the loop around a session, for people without one of their own."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import CheckpointError
from esper.kasmina.rng import rng_state, set_rng_state
from esper.tolaria.measure import LossFn
from esper.tolaria.session import EpochSummary, Session


class Trainer:
    """Trains a model for some epochs. With `session=None` it is the plain loop, no more.

    Its place in the data is saved with the session, and `fit` in a resumed run goes on from there.
    `batches` that have `state_dict` and `load_state_dict` (torchdata's StatefulDataLoader, say) are
    asked for their place. Others are iterated again from the start of the epoch, with the random
    state of that moment, and what was trained on is thrown away: the order of a shuffling
    DataLoader is the same then, and its first batches are loaded twice.

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
        self._done = 0  # epochs of this fit
        self._batch = 0  # batches of this epoch
        self._good_losses: list[Tensor] = []  # of this epoch
        self._rng: dict[str, Any] | None = None  # when this epoch's batches began
        self._resumed = False
        if session is not None:
            session.register("trainer", self)

    def fit(
        self,
        epochs: int,
        on_epoch: Callable[[int, EpochSummary | None, float], None] | None = None,
    ) -> None:
        """Train. `on_epoch` is called with (epoch, the session's summary, mean train loss).

        In a resumed run `epochs` counts those that were done before, too.
        """
        if not self._resumed:
            self._done, self._batch, self._good_losses = 0, 0, []
        self._resumed = False
        if self.session is not None:
            self.session.planned_epochs = epochs
        while self._done < epochs:
            self.model.train()
            sampler: Any = getattr(self.batches, "sampler", None)
            if hasattr(sampler, "set_epoch"):  # DistributedSampler: another order every epoch
                sampler.set_epoch(self._done)
            for batch in self._rest_of_epoch():
                started = time.perf_counter()
                self.optimizer.zero_grad(set_to_none=True)
                loss = self.loss_fn(self.model, batch)
                loss.backward()
                self.optimizer.step()
                self._batch += 1
                self._good_losses.append(loss.detach())
                self.step_seconds.append(time.perf_counter() - started)
                if self.session is not None and not self.session.step(loss):
                    self._good_losses.pop()
                self.step_seconds[-1] = time.perf_counter() - started
            if self.scheduler is not None:
                self.scheduler.step()
            losses, self._good_losses = self._good_losses, []
            self._done, self._batch = self._done + 1, 0
            summary = self.session.epoch(save=False) if self.session is not None else None
            if on_epoch is not None:
                # Summed up here: looking at each loss would make the host wait at every step.
                mean = float(torch.stack(losses).mean()) if losses else float("nan")
                on_epoch(self._done, summary, mean)
            if self.session is not None:
                self.session.end_of_epoch()

    def _rest_of_epoch(self) -> Iterator[Any]:
        if self._batch == 0 or hasattr(self.batches, "load_state_dict"):
            self._rng = rng_state() if self.session is not None else None
            yield from self.batches
            return
        now = rng_state()
        if self._rng is not None:
            set_rng_state(self._rng)
        batches = iter(self.batches)
        for number in range(self._batch):
            try:
                next(batches)
            except StopIteration:
                raise CheckpointError(
                    f"the run stopped after batch {self._batch} of an epoch, and the data has "
                    f"{number}; resume with the same data"
                ) from None
        set_rng_state(now)
        yield from batches

    # -- its place in a checkpoint --------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self._done, "batch": self._batch, "rng": self._rng if self._batch else None,
            "good_losses": torch.stack(self._good_losses) if self._good_losses else None,
            "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
            "batches": self.batches.state_dict() if hasattr(self.batches, "state_dict") else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._done, self._batch = state_dict["done"], state_dict["batch"]
        if self.session is not None:  # which knows of a change in the number of processes
            self._batch = self.session.batch
        self._rng, losses = state_dict["rng"], state_dict["good_losses"]
        self._good_losses = list(losses.unbind()) if losses is not None else []
        self.step_seconds = array("d", state_dict["step_seconds"].tolist())
        if state_dict["batches"] is not None:
            self.batches.load_state_dict(state_dict["batches"])  # type: ignore[attr-defined]
