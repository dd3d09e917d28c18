"""A torch.compile'd host over twelve growths: behind slots, and the naive way.

Naive is what one writes without esper: the seed is a plain module, put after the site, and the
host is compiled again, for its graph has changed. Both train the same host on the same data and
grow as often; counted are the graphs that were compiled and the longest step around each growth,
in plain steps, and every step of both runs is drawn. What is done between two steps, commands
included, counts to the next. The kernels of ours are compiled beforehand, as the slow track does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import esper
from benchmarks.kernels import validated_library
from benchmarks.pairs import alternate, note
from esper.kasmina.loader import Loader
from esper.leyline.command import Action, Command
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.optimizer import OptimizerSurgeon

WIDTH, DEPTH, GROWTHS = 128, 12, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Bottleneck(nn.Module):
    """What the naive way puts after a site; an identity at birth, as seeds are."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(F.gelu(self.down(h)))


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(DEPTH)], nn.Linear(WIDTH, 10))


class Training:
    """One run; `seconds` of every step from the end of the step before, once it is warm."""

    def __init__(self, model: Any, plain: nn.Module) -> None:
        self.model = model
        self.seconds: list[float] = []
        self.growths: list[int] = []  # the steps before which it grew
        self.optimizer = torch.optim.Adam(plain.parameters(), 1e-3)
        self.x, self.y = torch.randn(64, WIDTH), torch.randint(0, 10, (64,))
        self.after: Callable[[], Any] = lambda: None

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.after()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
            now = time.perf_counter()
            self.seconds.append(now - self._ended)
            self._ended = now

    def warm(self) -> None:
        for _ in range(3):
            self.step()
        self._ended = time.perf_counter()
        self.steps(20)

    def grow(self) -> None:
        self.growths.append(len(self.seconds))

    @property
    def usual(self) -> list[float]:
        return self.seconds[: self.growths[0]]

    @property
    def pauses(self) -> list[float]:
        """The longest step from each growth to the next."""
        ends = [*self.growths[1:], len(self.seconds)]
        return [max(self.seconds[a:b]) for a, b in zip(self.growths, ends, strict=True)]


def naive() -> tuple[int, Training]:
    """(graphs compiled, the run)."""
    plain = host()
    count = CompileCounterWithBackend("inductor")
    train = Training(torch.compile(plain, backend=count), plain)
    train.warm()
    for growth in range(GROWTHS):
        train.grow()
        seed = Bottleneck()
        plain[growth] = nn.Sequential(plain[growth], seed)
        train.optimizer.add_param_group({"params": list(seed.parameters())})
        train.steps(7)
    return count.frame_count, train


def ours(library: Any, kernel: Any) -> tuple[int, Training]:
    plain = host()
    count = CompileCounterWithBackend("inductor")
    model = torch.compile(plain, backend=count)
    esper.wrap(model, sites=[str(i) for i in range(DEPTH)], example=torch.randn(2, WIDTH))
    growth = esper.growth_of(model)
    growth.graft_steps = 2
    train = Training(model, plain)
    growth.on_join, train.after = OptimizerSurgeon(train.optimizer).join, growth.tick
    loader = Loader(library)
    train.warm()

    def obey(action: Action, site: str) -> None:
        growth.obey(Command(action=action, site=site, kernel_id=kernel.kernel_id,
                            blueprint_id=kernel.blueprint_id, reason="benchmark"), loader)

    for number in range(GROWTHS):
        site = str(number)
        train.grow()
        obey(Action.GERMINATE, site)
        while growth.sites[site].state is SeedState.GERMINATED:
            train.steps(1)
        train.steps(2)
        obey(Action.ADVANCE, site)
        train.steps(2)
        obey(Action.ADVANCE, site)
        obey(Action.FOSSILIZE, site)
        train.steps(2)
    loader.close()
    assert len(growth.fossils()) == GROWTHS and not any(f.failure for f in growth.fossils())
    return count.frame_count, train


@pytest.mark.slow
def test_twelve_growths(benchmark: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=WIDTH)
    library, kernel = validated_library(tmp_path, signature)
    found: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    timed = lambda: benchmark.pedantic(lambda: ours(library, kernel), rounds=1)  # noqa: E731
    for name, run in (("naive", naive), ("slots", timed)):
        torch.compiler.reset()
        counters.clear()
        graphs, train = run()
        usual, pauses = train.usual, train.pauses
        plain = median(usual)
        runs[name] = {"seconds": train.seconds, "marks": train.growths}
        found[name] = {
            "graphs": graphs, "plain_step_seconds": usual, "longest_step_seconds": pauses,
            "graph_breaks": sum(counters["graph_break"].values()),
            "median_pause_in_steps": median(pauses) / plain,
            "longest_pause_in_steps": max(pauses) / plain,
        }
        print(f"\n{name:6} {graphs} graphs, {found[name]['graph_breaks']} graph breaks; plain step "
              f"{1e3 * plain:.2f} ms; longest step around a growth: median "
              f"{1e3 * median(pauses):.1f} ms ({median(pauses) / plain:.1f} steps), longest "
              f"{1e3 * max(pauses):.1f} ms ({max(pauses) / plain:.1f} steps)")
    lines = {name: [[None, median(found[key]["longest_step_seconds"])]]
             for name, key in (("esper, slots", "slots"), ("recompiled, naively", "naive"))}
    lines["plain step"] = [[None, median(found["slots"]["plain_step_seconds"])]]
    benchmark.extra_info.update(
        target="1 graph over 12 growths, 0 graph breaks", **found, untimed=True,
        series={"compiled host, longest step around a growth": {
            "size_unit": "", "limits": ["plain step"], "lines": lines}},
        traces={"every step of a compiled host over twelve growths": {
            "esper, slots": runs["slots"], "recompiled, naively": runs["naive"]}})


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 1024])
def test_dormant_slots_in_a_compiled_host(benchmark: Any, batch: int) -> None:
    """A training step with twelve empty slots, beside the same host compiled without them."""
    torch.set_num_threads(1)
    plain = host()
    slotted = copy.deepcopy(plain)
    with_slots = torch.compile(slotted)
    esper.wrap(with_slots, sites=[str(i) for i in range(DEPTH)], example=torch.randn(2, WIDTH))
    steppers = [Training(with_slots, slotted), Training(torch.compile(plain), plain)]
    for train in steppers:
        train.x, train.y = torch.randn(batch, WIDTH), torch.randint(0, 10, (batch,))
        for _ in range(3):
            train.step()
    pair = alternate(steppers[0].step, steppers[1].step, rounds=150, inner=2)
    note(benchmark, pair, target="none; measured to be known")
    benchmark.pedantic(steppers[0].step, rounds=20)
