"""Watching the losses of a run for the one that says it has gone wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def look_every(model: nn.Module) -> int:
    """Steps between two looks at the losses: on a CPU nobody waits for one."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return 1 if device == "cpu" else 20


class LossWatch:
    """Looks at every `check_every`-th step, at all losses since then: looking makes the host wait
    for a GPU. A loss is bad that is NaN, infinite, or over `explosion` times the largest of the
    last 50. (Not their median: late in a run single batches differ by more than that.)

    Where several ranks train, `over_ranks` makes of their losses those to look at.
    """

    def __init__(
        self, explosion: float, check_every: int,
        over_ranks: Callable[[Tensor], Tensor] = lambda losses: losses,
    ) -> None:
        self.explosion, self.check_every = explosion, check_every
        self._over_ranks = over_ranks
        self.recent: deque[float] = deque(maxlen=50)
        self.of_epoch: list[float] = []
        self._unseen: list[Tensor] = []

    def add(self, loss: Tensor) -> bool:
        """Keep one loss; True where it is time to `look`."""
        self._unseen.append(loss.detach())
        return len(self._unseen) >= self.check_every

    def look(self) -> float | None:
        """The first bad loss among those not looked at yet, None where all are fine."""
        # One synchronization for all of them.
        losses = torch.stack(self._unseen) if self._unseen else torch.empty(0)
        values = self._over_ranks(losses).tolist()
        self.of_epoch += values
        self._unseen.clear()
        for value in values:
            if not math.isfinite(value) or self._exploded(value):
                return float(value)
            self.recent.append(value)
        return None

    def _exploded(self, value: float) -> bool:
        return len(self.recent) >= 20 and value > self.explosion * max(self.recent)

    def forget(self) -> None:
        """The run was rolled back: what was seen says nothing of what comes."""
        self.recent.clear()
        self.of_epoch.clear()

    def state_dict(self) -> dict[str, Any]:
        """Only between a `look` and the next `add`."""
        return {"recent": self.recent, "of_epoch": self.of_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent, self.of_epoch = state["recent"], state["of_epoch"]
