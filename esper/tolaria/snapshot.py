"""A copy of the run in memory, to go back to when it goes wrong."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.tolaria.optimizer import per_group


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class Snapshot:
    """Parameters, buffers, optimizer state and settings, scheduler and random states.

    Parameters in `without` (seeds on their way, which do not outlive a rollback) are left
    out. `restore` expects the same parameters, less those, to be in the model again.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Any, without: set[int]
    ) -> None:
        self._tensors = [
            (t, t.detach().clone())
            for t in [*model.parameters(), *model.buffers()] if id(t) not in without
        ]
        self._optimizer = {
            p: {k: _cloned(v) for k, v in state.items()}
            for p, state in optimizer.state.items() if id(p) not in without
        }
        self._groups = [
            {k: copy.deepcopy(v) for k, v in g.items() if k != "params"}
            for g in optimizer.param_groups
            if any(id(p) not in without for p in g["params"])
        ]
        self._scheduler = copy.deepcopy(_scheduler_state(scheduler))
        self._rng = _rng_state()

    def restore(self, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        with torch.no_grad():
            for live, saved in self._tensors:
                live.copy_(saved)
        optimizer.state.clear()
        for p, state in self._optimizer.items():
            optimizer.state[p] = {k: _cloned(v) for k, v in state.items()}
        for group, saved_group in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(saved_group))
        if self._scheduler is not None:
            now = [(part, name, list(values)) for part, name, values in per_group(scheduler)]
            scheduler.load_state_dict(copy.deepcopy(self._scheduler))
            for part, name, values in now:
                setattr(part, name, values)  # one entry per group that is there now
        optimizer.zero_grad(set_to_none=True)
        _set_rng_state(self._rng)


def _scheduler_state(scheduler: Any) -> Any:
    return None if scheduler is None else scheduler.state_dict()
