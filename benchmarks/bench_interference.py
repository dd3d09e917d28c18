"""Training steps with the slow track at work on the same cores, beside training alone.

Both sides of the bargain are reported: the trainer's p50 and p99, and how many blueprints
were compiled meanwhile, per hour. A ratio of 1.0 with nothing compiled would be worthless.
Windows with and without the slow track alternate in shuffled order. The slow track is
started before its window and given time to import, as it is in a run of any length.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.slowtrack import SlowTrack
from esper.urza.library import LocalLibrary

WINDOW_SECONDS, WINDOWS = 40.0, 2


def _compiled(library: LocalLibrary) -> int:
    return sum(b.status is BlueprintStatus.COMPILED for b in library.blueprints())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_step_time_beside_the_slow_track(benchmark: Any, tmp_path: Path, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def window() -> list[float]:
        times, end = [], time.monotonic() + WINDOW_SECONDS
        while time.monotonic() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times

    library = LocalLibrary(tmp_path)
    library.register_signature(SiteSignature(kind=SiteKind.MAP, channels=32))
    samples: dict[bool, list[float]] = {False: [], True: []}
    compiled, busy_seconds = 0, 0.0
    order = [False, True] * WINDOWS
    random.Random(0).shuffle(order)
    window()  # warm-up
    for beside in order:
        if not beside:
            samples[False] += window()
            continue
        with SlowTrack(tmp_path, log_file=tmp_path / "log"):
            time.sleep(8.0)
            before, started = _compiled(library), time.monotonic()
            samples[True] += window()
            busy_seconds += time.monotonic() - started
            compiled += _compiled(library) - before

    def quantile(beside: bool, q: float) -> float:
        return float(np.quantile(samples[beside], q))

    p50, p99 = (quantile(True, q) / quantile(False, q) for q in (0.5, 0.99))
    per_hour = compiled / busy_seconds * 3600
    benchmark.extra_info.update(
        target="p50 <= 1.02, p99 <= 1.05, >= 20 an hour", threads=threads, p50_ratio=p50,
        p99_ratio=p99, compiled=compiled, compiled_per_hour=per_hour,
        alone_seconds=samples[False], beside_seconds=samples[True],
    )
    print(f"\n{threads} threads: p50 x {p50:.3f}, p99 x {p99:.3f}; {compiled} compiled in "
          f"{busy_seconds:.0f} s, {per_hour:.0f} an hour")
    benchmark.pedantic(step, rounds=20)
