"""What a task is trained on, and how a model does on a split."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from esper.data.splits import Batch, Batches, Task
from esper.kasmina.probe import undisturbed

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy in nats; classes are the last axis of the model's output."""
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error over all predicted numbers."""
    return F.mse_loss(model(batch[0]), batch[1])


def loss_of(task: Task) -> tuple[str, Loss]:
    """The name of a task's loss, for people, and the loss."""
    if task == "regression":
        return "squared error", squared_error
    return "cross entropy", cross_entropy


def evaluate(
    model: nn.Module, batches: Batches, task: Task = "classification"
) -> tuple[float, float | None]:
    """(mean loss of the task, accuracy) over a split, in eval mode; the model stays as it was. A
    regression has no accuracy."""
    loss = right = count = 0.0
    with undisturbed(model):
        for inputs, targets in batches:
            output = model(inputs)
            if task == "regression":
                loss += float(F.mse_loss(output, targets, reduction="sum"))
            else:
                logits, wanted = output.flatten(0, -2), targets.flatten()
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
                right += float((logits.argmax(-1) == wanted).sum())
            count += targets.numel()
    return loss / count, None if task == "regression" else right / count
