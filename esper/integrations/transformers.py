"""Growth under the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from esper.errors import ContractError
from esper.integrations.growing import Growing
from esper.kasmina.output import parts_of
from esper.tolaria.measure import LossFn


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model of transformers returns: by name, or the first of a tuple."""
    found = dict(parts_of(output))
    loss = found.get("loss", found.get(0))
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model itself computes of a batch with labels."""
    loss = loss_of(model(**batch))
    if loss is None:
        raise ContractError("the model returned no loss for a held-out batch; put labels into the "
                            "batches of holdout, or give the callback a loss_fn")
    return loss


class EsperCallback(TrainerCallback):
    """Grows the model that is trained, which `esper.wrap` was given, or a module in it.

        esper.wrap(model, sites=["transformer.h.*"], example=ids, causal=True)
        Trainer(model, ..., callbacks=[EsperCallback(holdout=[batch], library=...)]).train()

    Steps of the optimizer count, not micro-batches, and an epoch of the trainer is one of the
    session. The loss of a step is taken from the model's output, where the Trainer takes it too.
    Other arguments are those of `Growing`.

    Raises, while training:
        ContractError: several processes; or the loss is not in the model's output.
        SiteError: nothing in the model is wrapped.
    """

    def __init__(
        self, *, holdout: Sequence[Any], loss_fn: LossFn = model_loss, **options: Any
    ) -> None:
        self._growing = Growing(loss_fn, holdout, **options)
        self._hook: Any = None
        self._shares = False  # whether a loss is its micro-batch's share of the step's
        self._seen = 0

    @property
    def session(self) -> Any:
        """The `esper.Session`; None until training has begun."""
        return self._growing.session

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, scheduler = given["model"], given.get("lr_scheduler")
        self._growing.begin(model, given["optimizer"], scheduler, None, args.world_size,
                            state.num_train_epochs or None)

        # A function, no method: a copy of the model (an average of weights) copies its hooks, and
        # is not to copy the session.
        def saw(module: nn.Module, given: Any, named: Any, output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                loss = loss_of(output)
                if loss is not None:
                    self._growing.saw(loss)
                    self._seen += 1
                self._shares = named.get("num_items_in_batch") is not None

        self._hook = model.register_forward_hook(saw, with_kwargs=True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not self._seen:
            raise ContractError(
                "no loss was seen in the model's output: it has no labels, or the Trainer computes "
                "the loss itself (label smoothing, compute_loss_func). Let the model compute it, "
                "or use esper.Session in a loop of your own"
            )
        self._growing.stepped(mean=not self._shares)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._growing.epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hook.remove()
        self._growing.end()
