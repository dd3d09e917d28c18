"""The longest pause of a training run when a seed germinates, in plain steps.

A real kernel, compiled beforehand, comes out of a real library while the host trains. The
peer is the same run without growth, in the same process, in alternation.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from benchmarks.kernels import validated_library
from esper.kasmina.loader import Loader
from esper.leyline.command import Action, Command
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.optimizer import OptimizerSurgeon


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def host() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *[Block(32) for _ in range(6)],
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.slow
def test_pause_at_germination(benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    signature = SiteSignature(kind=SiteKind.MAP, channels=32)
    library, kernel = validated_library(tmp_path, signature)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    plain_steps: list[float] = []
    pauses: list[float] = []

    def train(model: nn.Module, optimizer: Any, after: Any, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            after()
            times.append(time.perf_counter() - start)
        return times

    for _ in range(6):
        plain = host()
        plain_steps += train(plain, torch.optim.Adam(plain.parameters()), lambda: None, 12)[2:]
        grown = host()
        esper.wrap(grown, sites=["3"], example=x)
        growth = esper.growth_of(grown)
        optimizer = torch.optim.Adam(grown.parameters())
        growth.on_join = OptimizerSurgeon(optimizer).join
        loader = Loader(library)
        train(grown, optimizer, growth.tick, 4)
        growth.obey(Command(action=Action.GERMINATE, site="3", kernel_id=kernel.kernel_id,
                            blueprint_id=kernel.blueprint_id, reason="benchmark"), loader)
        during: list[float] = []
        while growth.sites["3"].state is SeedState.GERMINATED:
            during += train(grown, optimizer, growth.tick, 1)
        after = train(grown, optimizer, growth.tick, 8)
        loader.close()
        # The seed's own work is no pause: steps after the swap are held against their median.
        pauses.append(max(max(during) - median(plain_steps), max(after) - median(after)))
    plain_step = median(plain_steps)
    extra = [p / plain_step for p in pauses]
    benchmark.extra_info.update(
        target="<= 1 extra step", plain_step_seconds=plain_step, pause_seconds=pauses,
        longest_pause_in_steps=max(extra), median_pause_in_steps=median(extra),
        plain_steps_seconds=plain_steps,
    )
    print(f"\nlongest pause {max(extra):.2f} plain steps, median {median(extra):.2f} "
          f"(plain step {1e3 * plain_step:.1f} ms, its own spread "
          f"{1e3 * min(plain_steps):.1f} to {1e3 * max(plain_steps):.1f} ms)")
    optimizer = torch.optim.Adam(plain.parameters())
    benchmark.pedantic(lambda: train(plain, optimizer, lambda: None, 1), rounds=10)
