"""Which of two builds of one kernel is the faster: in alternation, at several sizes.

A kernel is compiled for any batch and trained at whatever comes: what wins at one size loses
at another, so the figure is a geometric mean over small, middling and large ones. Both take
turns in one process, so that whatever slows the machine down slows both.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.lower import Lowered

# (batch, space)
SIZES: Mapping[SiteKind, tuple[tuple[int, int], ...]] = {
    SiteKind.FEATURES: ((4, 1), (64, 1), (512, 1)),
    SiteKind.TOKENS: ((2, 16), (8, 32), (32, 64)),
    SiteKind.MAP: ((2, 8), (8, 16), (32, 16)),
}
ROUNDS = 25
SAMPLE_SECONDS = 0.3e-3  # or one call, where that takes longer
MOST_SECONDS = 4.0  # at one size, once a few rounds are done
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Build:
    """Both halves as lowered, and the folder with `forward.so` and `backward.so`."""

    name: str
    lowered: Lowered
    folder: Path


def _step(build: Build) -> Callable[[torch.Tensor], None]:
    """A forward and a backward at the shape of what it is given."""
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu
    forward, backward = (runner(str(build.folder / f"{n}.so"), 1) for n in ("forward", "backward"))
    generator = torch.Generator().manual_seed(0)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like).uniform_(-0.2, 0.2, generator=generator)

    constant = [torch.tensor(0.5), *map(drawn, build.lowered.forward.examples[2:])]

    def step(h: torch.Tensor) -> None:
        given = [h, *constant]
        made = forward.run(given)
        named = {f"in:{i}": t for i, t in enumerate(given)} | {"grad": h}
        named |= {f"out:{i}": t for i, t in enumerate(made)}
        backward.run([named[name] for name in build.lowered.backward_inputs])

    return step


def ratio(signature: SiteSignature, first: Build, second: Build) -> float:
    """Time of `second` over the time of `first`; a ratio of medians at each size, and their
    geometric mean."""
    steps = [_step(first), _step(second)]
    order, ratios = random.Random(0), []
    for batch, space in SIZES[signature.kind]:
        h = torch.randn(signature.shape(batch, space)).to(getattr(torch, signature.dtype))
        started = time.perf_counter()
        for step in steps * 2:
            step(h)
        once = (time.perf_counter() - started) / 4
        calls = max(1, round(SAMPLE_SECONDS / once))
        samples: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + MOST_SECONDS
        while len(samples[0]) < ROUNDS and (
            len(samples[0]) < FEWEST_ROUNDS or time.perf_counter() < end
        ):
            for which in order.sample((0, 1), 2):
                started = time.perf_counter()
                for _ in range(calls):
                    steps[which](h)
                samples[which].append(time.perf_counter() - started)
        ratios.append(statistics.median(samples[1]) / statistics.median(samples[0]))
    return math.exp(statistics.fmean(map(math.log, ratios)))
