"""How fast a kernel is beside eager: samples in alternation, and an interval, not a number.

Both sides run in one process, one after the other in every round and in a random order, so
that whatever slows the machine down slows both. The statistic is the ratio of medians; its
95 % interval comes from a bootstrap over rounds, which keeps the two samples of one round
together. Measuring stops when the interval is narrow or the time is used up, never because
the verdict pleases; outliers stay in.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from esper.kasmina.artifact import Kernel, this_isa
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import Hardware, Measurement, SpeedVerdict
from esper.urabrask.oracle import Problem, reference_kernel
from esper.urabrask.problems import draw, typical

MARGIN = 0.05
MIN_SAMPLE_SECONDS = 1e-3  # far above the clock's resolution and one scheduler tick's cost
MIN_ROUNDS = 20
MAX_ROUNDS = 200  # raw samples are kept in the report, which others read again and again
RESAMPLES = 2000
NARROW = 0.02  # width of the interval over the ratio at which more rounds add nothing


@dataclass(frozen=True)
class Comparison:
    """Raw samples of both sides, in seconds per call, round by round, and what they say."""

    ratio: float
    low: float
    high: float
    kernel: tuple[float, ...]
    eager: tuple[float, ...]

    @property
    def verdict(self) -> SpeedVerdict:
        return judge(self.low, self.high)


def judge(low: float, high: float) -> SpeedVerdict:
    """FAST and SLOW where the whole interval is beyond the margin, SAME where it is within."""
    if low > 1 + MARGIN:
        return SpeedVerdict.FAST
    if high < 1 - MARGIN:
        return SpeedVerdict.SLOW
    if low >= 1 - MARGIN and high <= 1 + MARGIN:
        return SpeedVerdict.SAME
    return SpeedVerdict.AMBIGUOUS


def interval(
    kernel: list[float], eager: list[float], rng: np.random.Generator
) -> tuple[float, float, float]:
    """(ratio, low, high): median(eager) / median(kernel) and its 95 % percentile bootstrap."""
    k, e = np.asarray(kernel), np.asarray(eager)
    rounds = rng.integers(0, len(k), size=(RESAMPLES, len(k)))
    ratios = np.median(e[rounds], axis=1) / np.median(k[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(e) / np.median(k)), float(low), float(high)


def _calibrate(call: Callable[[], object], seconds: float) -> int:
    """Calls per sample, so that one sample takes about `seconds`."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(1, min(100_000, round(seconds / max(statistics.median(times), 1e-9))))


def compare(
    kernel: Callable[[], object],
    eager: Callable[[], object],
    *,
    budget_seconds: float = 2.0,
    seed: int = 0,
) -> Comparison:
    """Time `kernel` and `eager` in alternation for at most about `budget_seconds`."""
    deadline = time.perf_counter() + budget_seconds
    sides = (kernel, eager)
    for side in sides:
        side()
    # Samples as long as lets the rounds fill the budget: longer ones are less noisy.
    sample = max(MIN_SAMPLE_SECONDS, budget_seconds / (2 * MAX_ROUNDS))
    repeats = [_calibrate(side, sample) for side in sides]
    rng = np.random.default_rng(seed)
    samples: tuple[list[float], list[float]] = ([], [])
    next_look = MIN_ROUNDS
    while len(samples[0]) < MAX_ROUNDS:
        for i in rng.permutation(2):
            call, count = sides[i], repeats[i]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[i].append((time.perf_counter() - start) / count)
        rounds = len(samples[0])
        if rounds >= 3 and time.perf_counter() > deadline:
            break
        if rounds >= next_look:
            # Looks grow further apart, so that their number, and their cost, stays small.
            next_look = rounds * 3 // 2
            ratio, low, high = interval(*samples, rng)
            if high - low < NARROW * ratio:
                break
    ratio, low, high = interval(*samples, rng)
    return Comparison(ratio, low, high, tuple(samples[0]), tuple(samples[1]))


def step(kernel: Kernel, problem: Problem) -> Callable[[], object]:
    """One forward and backward of `kernel` on `problem`, as a training step does it."""
    h = problem.h.detach().requires_grad_(True)
    params = [p.detach().requires_grad_(True) for p in problem.params]
    leaves = [h, *params]

    def call() -> object:
        out = kernel(h, params, problem.alpha, problem.mode)
        return torch.autograd.grad(out, leaves, problem.grad_out)

    return call


def shapes(signature: SiteSignature) -> tuple[tuple[int, int], ...]:
    """(batch, space) that are measured: a small and a large step at such a site."""
    match signature.kind:
        case SiteKind.FEATURES:
            return ((16, 8), (256, 8))
        case SiteKind.TOKENS:
            return ((4, 16), (16, 64))
        case SiteKind.MAP:
            return ((4, 8), (16, 16))


def measure(
    kernel: Kernel,
    ir: BlueprintIR,
    signature: SiteSignature,
    batch: int,
    space: int,
    *,
    budget_seconds: float = 2.0,
) -> Measurement:
    """Kernel beside eager at one shape, forward and backward, at alpha 0.5 where it has a blend."""
    problem = draw(ir, signature, typical(signature, batch, space, 0.5), seed=0)
    found = compare(
        step(kernel, problem),
        step(reference_kernel(ir, signature), problem),
        budget_seconds=budget_seconds,
    )
    return Measurement(
        batch=batch,
        space=space,
        speedup=found.ratio,
        low=found.low,
        high=found.high,
        verdict=found.verdict,
        kernel_seconds=found.kernel,
        eager_seconds=found.eager,
    )


def hardware(device: str = "cpu") -> Hardware:
    """Where this process measures."""
    return Hardware(
        cpu=_processor(device),
        isa=this_isa(device),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
    )


def _processor(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_bytes(call: Callable[[], object]) -> int | None:
    """The most bytes of tensor memory that `call` holds at once beyond what it started with.

    Counted from every allocation and release that torch's profiler sees, so it does not
    depend on the machine. None where the profiler reports no allocation.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    if results is None:
        return None
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak if events else None


@dataclass(frozen=True)
class SelfTest:
    """An A/A run: both sides are the same code, so every FAST is false."""

    runs: int
    false_fast: int
    false_slow: int
    widest: float

    @property
    def false_fast_rate(self) -> float:
        return self.false_fast / self.runs


def self_test(runs: int = 100, *, budget_seconds: float = 0.2, seed: int = 0) -> SelfTest:
    """How often this bench, on this machine and now, calls a difference that is not there."""
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    h = torch.randn(64, 64, requires_grad=True)

    def call() -> object:
        return torch.autograd.grad(torch.nn.functional.gelu(h @ weights).sum(), h)

    verdicts, widest = [], 0.0
    for i in range(runs):
        found = compare(call, call, budget_seconds=budget_seconds, seed=seed + i)
        verdicts.append(found.verdict)
        widest = max(widest, found.high - found.low)
    return SelfTest(
        runs,
        verdicts.count(SpeedVerdict.FAST),
        verdicts.count(SpeedVerdict.SLOW),
        widest,
    )
