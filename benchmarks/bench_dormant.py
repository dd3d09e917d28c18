"""A training step with twelve dormant slots, beside the same model without esper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import esper
from benchmarks.pairs import alternate, note


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.relu(self.up(x)))


def stepper(model: nn.Module, after: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(16, 256), torch.randint(0, 10, (16,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        after(loss)

    return step


def test_step_with_twelve_dormant_slots(benchmark: Any) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = nn.Sequential(*[Block(256) for _ in range(12)], nn.Linear(256, 10))
    host = copy.deepcopy(plain)
    esper.wrap(host, sites=[str(i) for i in range(12)], example=torch.randn(2, 256))
    optimizer = torch.optim.SGD(host.parameters(), lr=1e-3)
    batch = (torch.randn(16, 256), torch.randint(0, 10, (16,)))
    session = esper.Session(
        host, optimizer, loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]), holdout=[batch]
    )
    ours = stepper(host, session.step)
    # The plain loop looks at its loss too, as every real one does.
    peer = stepper(plain, lambda loss: float(loss.detach()))
    pair = alternate(ours, peer, rounds=300, inner=5)
    note(benchmark, pair, target="<= 1.01")
    benchmark.pedantic(ours, rounds=50)
    session.close()
