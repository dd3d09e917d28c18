"""What the callbacks have in common: a session that begins when there is an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from esper.errors import ContractError
from esper.tolaria.measure import LossFn
from esper.tolaria.session import Session


class Growing:
    """Holds the session of one run, and the losses of micro-batches until they make a step.

    Args:
        loss_fn: (model, batch) -> scalar loss, for the held-out batches; the model is the one
            that the framework trains.
        holdout: batches that are not trained on. They are moved to the model's device.
        options: those of `esper.Session`: library, policy, lr_scale, observers, ...

    `session` is None until the training has begun; it stays to be looked at when it has ended.
    """

    def __init__(self, loss_fn: LossFn, holdout: Sequence[Any], **options: Any) -> None:
        self.session: Session | None = None
        self._loss_fn, self._holdout, self._options = loss_fn, holdout, options
        self._losses: list[Tensor] = []

    def begin(
        self, model: nn.Module, optimizer: Any, scheduler: Any, scaler: Any, processes: int,
        epochs: int | None,
    ) -> None:
        """`epochs` is how long the run is to be, None where it is not known.

        Raises:
            ContractError: the run has several processes: each would grow a model of its own.
            SiteError: the model is not wrapped.
        """
        if processes > 1:
            raise ContractError(
                f"the run has {processes} processes, and the callbacks grow in one; run it with "
                "one device, or use esper.Session in a loop of your own"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def moved(part: Any) -> Any:
            return part.to(device) if isinstance(part, Tensor) else part

        self.session = Session(
            model, optimizer, loss_fn=self._loss_fn, scheduler=scheduler, scaler=scaler,
            holdout=[tree_map(moved, batch) for batch in self._holdout], **self._options,
        )
        self.session.planned_epochs = epochs

    def saw(self, loss: Tensor) -> None:
        """A micro-batch had this loss."""
        self._losses.append(loss.detach())

    def stepped(self, *, mean: bool) -> None:
        """An optimizer step is done; its loss is the mean of its micro-batches', or their sum."""
        if self.session is None or not self._losses:
            return
        losses = torch.stack(self._losses)
        self._losses.clear()
        self.session.step(losses.mean() if mean else losses.sum())

    def epoch(self) -> None:
        if self.session is not None:
            self.session.epoch()

    def end(self) -> None:
        if self.session is not None:
            self.session.close()
