"""How fast a kernel is beside eager: samples in alternation, and an interval, not a number.

All sides run in one process, one after the other in every round and in a random order, so
that whatever slows the machine down slows all. The statistic is the ratio of medians; its
95 % interval comes from a bootstrap over rounds, which keeps the samples of one round
together. Measuring stops when the interval is narrow or the time is used up, never because
the verdict pleases; outliers are flagged and stay in. (In the spirit of Criterion and nvbench.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper.leyline.verdict import Latency, Part, SpeedVerdict
from esper.urabrask.clock import Watch, clock, witness
from esper.urabrask.sides import Side

MARGIN = 0.05
# Far above the clock's resolution, and short enough that beside a busy trainer most samples
# are not interrupted: then the median does not see those that are.
SAMPLE_SECONDS = 0.25e-3
FEWEST_ROUNDS = 10  # however long they take: below that an interval means little
MIN_ROUNDS = 20
MAX_ROUNDS = 300  # raw samples are kept in the report, which others read again and again
RESAMPLES = 2000
NARROW = 0.02  # width of the interval over the ratio at which more rounds add nothing

Call = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Raw samples of all sides, in seconds per call, round by round, and what they say.

    `objection` is why they are not to be believed, or empty.
    """

    ratio: float
    low: float
    high: float
    kernel: tuple[float, ...]
    eager: tuple[float, ...]
    others: tuple[tuple[float, ...], ...]
    stopped: str
    objection: str

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
    kernel: Sequence[float], eager: Sequence[float], rng: np.random.Generator
) -> tuple[float, float, float]:
    """(ratio, low, high): median(eager) / median(kernel) and its 95 % percentile bootstrap."""
    k, e = np.asarray(kernel), np.asarray(eager)
    rounds = rng.integers(0, len(k), size=(RESAMPLES, len(k)))
    ratios = np.median(e[rounds], axis=1) / np.median(k[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(e) / np.median(k)), float(low), float(high)


def _calibrate(call: Call) -> int:
    """Calls per sample, so that one takes about `SAMPLE_SECONDS`."""
    times = []
    for _ in range(9):
        start = clock()
        call()
        times.append(clock() - start)
    return max(1, min(100_000, round(SAMPLE_SECONDS / max(statistics.median(times), 1e-9))))


def compare(
    kernel: Call,
    eager: Call,
    *others: Call,
    budget_seconds: float = 2.0,
    seed: int = 0,
    before: Call = lambda: None,
) -> Comparison:
    """Time all sides in alternation for about `budget_seconds`, or `FEWEST_ROUNDS` if longer.

    `before` runs ahead of every round and is not timed.
    """
    deadline = clock() + budget_seconds
    sides = (kernel, eager, *others)
    before()
    for side in sides:
        side()
    repeats = [_calibrate(side) for side in sides]
    rng = np.random.default_rng(seed)
    samples: list[list[float]] = [[] for _ in sides]
    watch = Watch(len(sides))
    next_look = MIN_ROUNDS
    stopped = "rounds"
    while len(samples[0]) < MAX_ROUNDS:
        before()
        for i in rng.permutation(len(sides)):
            call, count = sides[i], repeats[i]
            seen, start = witness(), clock()
            for _ in range(count):
                call()
            seconds = clock() - start
            watch.add(i, seconds, witness() - seen)
            samples[i].append(seconds / count)
        rounds = len(samples[0])
        if rounds >= FEWEST_ROUNDS and clock() > deadline:
            stopped = "time"
            break
        if rounds >= next_look:
            # Looks grow further apart, so that their number, and their cost, stays small.
            next_look = rounds * 3 // 2
            ratio, low, high = interval(samples[0], samples[1], rng)
            if high - low < NARROW * ratio:
                stopped = "narrow"
                break
    objection = watch.objection()
    ratio, low, high = interval(samples[0], samples[1], rng)
    return Comparison(
        ratio, low, high, tuple(samples[0]), tuple(samples[1]),
        tuple(tuple(s) for s in samples[2:]), stopped, objection,
    )


def halves(
    kernel: Side, eager: Side, compiled: Side | None = None, *, calls: int, budget_seconds: float
) -> tuple[Part, Part, str]:
    """Forward and backward apart, one call at a time: (forward, backward, objection).

    A mean over a loop has no tail, so the percentiles come from single calls; the clock's own
    cost, some tens of nanoseconds, is in each.
    """
    sides = [kernel, eager] + ([compiled] if compiled is not None else [])
    deadline = clock() + budget_seconds
    rng = np.random.default_rng(0)
    forward: list[list[float]] = [[] for _ in sides]
    backward: list[list[float]] = [[] for _ in sides]
    for side in sides * 3:
        side()
    watch = Watch(0)  # a single call is too short to be watched by itself
    while len(forward[0]) < calls and (len(forward[0]) < FEWEST_ROUNDS or clock() < deadline):
        for i in rng.permutation(len(sides)):
            side = sides[i]
            side.refresh()
            start = clock()
            out = side.forward()
            middle = clock()
            side.backward(out)
            end = clock()
            forward[i].append(middle - start)
            backward[i].append(end - middle)
    return _part(forward, rng), _part(backward, rng), watch.objection()


def _part(samples: Sequence[Sequence[float]], rng: np.random.Generator) -> Part:
    ratio, low, high = interval(samples[0], samples[1], rng)
    # To the nanosecond: more digits would be noise that every reader of the report pays for.
    kernel, eager, *others = (
        Latency(seconds=tuple(round(s, 9) for s in side)) for side in samples
    )
    return Part(kernel=kernel, eager=eager, compiled=others[0] if others else None,
                speedup=ratio, low=low, high=high)


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

    @property
    def at_most(self) -> float:
        """Upper end of the 95 % interval of the rate (one-sided, Clopper and Pearson 1934)."""
        from scipy.stats import beta

        if self.false_fast == self.runs:
            return 1.0
        return float(beta.ppf(0.95, self.false_fast + 1, self.runs - self.false_fast))


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
