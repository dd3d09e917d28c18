"""A small experiment on digits: quick, and with room to grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.data.config import DataConfig
from esper.data.sets import load_data
from esper.evaluation.experiment import Experiment, Growing
from esper.tamiyo.care import Care
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.triggers import Schedule
from esper.tamiyo.twins import RandomTwin

WIDTH = 8


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.first(x.flatten(1))))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def experiment(**changes: Any) -> Experiment:
    data = load_data(DataConfig(name="digits", limit=200, eval_limit=100), Path("x"))
    made = Experiment(
        name="small", data=data, batch_size=32, epochs=6, host=Host, block=Block,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), sites=("act",),
        blocks=2, first=2, every=2,
        policy=lambda seed: HeuristicPolicy(Schedule(1, 1), care=Care(training_epochs=1),
                                            seed=seed),
        random=lambda seed: RandomTwin(6, like=Schedule(1, 1), care=Care(training_epochs=1),
                                       seed=seed),
        growing=Growing(graft_steps=4, embargo_epochs=1),
    )
    return replace(made, **changes)
