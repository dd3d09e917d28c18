"""Optimizer surgery: parameters join and leave, the state of all others is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

# What a group or one of torch's schedulers keeps as a learning rate of a group.
_RATES = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs"})
# Lists in which torch's schedulers keep one entry per group.
_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums")


def per_group(scheduler: Any) -> Iterator[tuple[Any, str, list[Any]]]:
    """(scheduler, attribute, list) for every list with one entry per group, of a scheduler and of
    those it is made of (SequentialLR, ChainedScheduler)."""
    for name in _PER_GROUP:
        if isinstance(values := getattr(scheduler, name, None), list):
            yield scheduler, name, values
    for part in getattr(scheduler, "_schedulers", ()):
        yield from per_group(part)


class OptimizerSurgeon:
    """New parameters get a group of their own with the settings of the first group.

    `lr_scale` multiplies that group's learning rate. Schedulers of torch's own are told of the
    new group; it follows the first group's schedule.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any = None, lr_scale: float = 1.0) -> None:
        self.optimizer, self.scheduler, self.lr_scale = optimizer, scheduler, lr_scale

    def join(self, params: Sequence[nn.Parameter]) -> None:
        first = self.optimizer.param_groups[0]
        settings = {k: v for k, v in first.items() if k not in ("params", "param_names")}
        for key in _RATES & settings.keys():
            settings[key] = settings[key] * self.lr_scale
        self.optimizer.add_param_group({**settings, "params": list(params)})
        for _, name, values in per_group(self.scheduler):
            values.append(values[0] * self.lr_scale if name in _RATES else values[0])

    def leave(self, params: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in params}
        if not gone:
            return
        kept = []
        for index, group in enumerate(self.optimizer.param_groups):
            had = bool(group["params"])
            group["params"] = [p for p in group["params"] if id(p) not in gone]
            if group["params"] or not had:
                kept.append(index)
        groups = self.optimizer.param_groups
        for _, _, values in per_group(self.scheduler):
            values[:] = [values[i] for i in kept]
        groups[:] = [groups[i] for i in kept]
        for p in params:
            self.optimizer.state.pop(p, None)
