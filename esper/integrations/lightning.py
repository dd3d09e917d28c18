"""Growth under Lightning's Trainer, from `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from esper.errors import ContractError
from esper.integrations.growing import Growing
from esper.tolaria.measure import LossFn


def _framework() -> Any:
    """The one that the script imported; their callbacks are not each other's."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    try:
        return import_module(names[0])
    except ModuleNotFoundError:
        return import_module(names[1])


class EsperCallback(_framework().Callback):  # type: ignore[misc]
    """Grows the LightningModule that is trained, which `esper.wrap` was given, or a module in it.

        esper.wrap(module, sites=["net.1"], example=x)
        Trainer(callbacks=[EsperCallback(loss_fn=..., holdout=[batch], library=...)]).fit(module)

    Steps of the optimizer count, not micro-batches, and an epoch of the trainer is one of the
    session. Held-out losses are computed under the trainer's precision. Arguments are those of
    `Growing`.

    Raises, when training begins:
        ContractError: manual optimization, more than one optimizer, scheduler or process.
        SiteError: nothing in the module is wrapped.
    """

    def __init__(self, *, loss_fn: LossFn, holdout: Sequence[Any], **options: Any) -> None:
        super().__init__()
        self._loss_fn = loss_fn
        self._growing = Growing(self._loss, holdout, **options)
        self._context: Any = None
        self._steps = 0

    @property
    def session(self) -> Any:
        """The `esper.Session`; None until training has begun."""
        return self._growing.session

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self._context():
            return self._loss_fn(model, batch)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
        if not pl_module.automatic_optimization:
            raise ContractError(
                f"{type(pl_module).__name__} optimizes by hand; use esper.Session in its "
                "training_step in place of the callback"
            )
        if len(trainer.optimizers) != 1 or len(schedulers) > 1:
            raise ContractError(
                f"the trainer has {len(trainer.optimizers)} optimizers and {len(schedulers)} "
                "schedulers; the callback serves one optimizer and at most one scheduler"
            )
        self._context = trainer.precision_plugin.forward_context
        self._steps = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._growing.begin(
            pl_module, trainer.optimizers[0], schedulers[0] if schedulers else None, scaler,
            trainer.world_size, epochs if (epochs := trainer.max_epochs or 0) > 0 else None,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:
            self._growing.saw(outputs["loss"])  # divided by the number of micro-batches
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._growing.stepped(mean=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._growing.epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._growing.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._growing.end()
