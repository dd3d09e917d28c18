"""Optimizer surgery: parameters join and leave, the state of all others is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class OptimizerSurgeon:
    """New parameters get a group of their own with the settings of the first group.

    `lr_scale` multiplies that group's learning rate. A scheduler that keeps `base_lrs` (all
    of torch's LRScheduler family) is told of the new group.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any = None, lr_scale: float = 1.0) -> None:
        self.optimizer, self.scheduler, self.lr_scale = optimizer, scheduler, lr_scale

    def join(self, params: Sequence[nn.Parameter]) -> None:
        first = self.optimizer.param_groups[0]
        settings = {k: v for k, v in first.items() if k not in ("params", "param_names")}
        for key in ("lr", "initial_lr"):
            if key in settings:
                settings[key] = settings[key] * self.lr_scale
        self.optimizer.add_param_group({**settings, "params": list(params)})
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs.append(settings.get("initial_lr", settings["lr"]))

    def leave(self, params: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in params}
        if not gone:
            return
        kept_groups, kept_lrs = [], []
        base_lrs = getattr(self.scheduler, "base_lrs", [None] * len(self.optimizer.param_groups))
        for group, lr in zip(self.optimizer.param_groups, base_lrs, strict=True):
            had = bool(group["params"])
            group["params"] = [p for p in group["params"] if id(p) not in gone]
            if group["params"] or not had:
                kept_groups.append(group)
                kept_lrs.append(lr)
        self.optimizer.param_groups[:] = kept_groups
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs[:] = kept_lrs
        for p in params:
            self.optimizer.state.pop(p, None)
