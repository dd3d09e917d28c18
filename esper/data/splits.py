"""A data set in its three parts, and how a split is walked through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Task = Literal["classification", "language", "regression"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Inputs and targets, sample by sample along the first axis."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def first(self, limit: int | None) -> Split:
        return Split(self.inputs[:limit], self.targets[:limit])


@dataclass(frozen=True)
class DataSet:
    """`example` is a batch of two inputs; `classes` counts classes, symbols of a text, or the
    numbers that a regression predicts."""

    name: str
    task: Task
    train: Split
    holdout: Split
    eval: Split
    example: Tensor
    classes: int


class Batches:
    """Iterates a split in batches; anew shuffled at every pass where `seed` is given.

    The order depends on the seed and the number of the pass alone, not on what else draws
    random numbers, so that two runs see the same batches.
    """

    def __init__(self, split: Split, size: int, seed: int | None = None) -> None:
        self.split, self.size, self.seed = split, size, seed
        self._passes = 0  # begun
        self._batch = 0  # of the pass that is going on
        self._start = 0  # of the next pass

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self.split))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._passes)
            order = torch.randperm(len(self.split), generator=generator)
        self._passes += 1
        start, self._start = self._start, 0
        for number, chosen in enumerate(order.split(self.size)):
            if number >= start:
                self._batch = number + 1
                yield self.split.inputs[chosen], self.split.targets[chosen]
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._passes, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["batch"]
        self._passes = state_dict["passes"] - (1 if self._start else 0)
