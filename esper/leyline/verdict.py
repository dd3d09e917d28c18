"""What Urabrask says about a kernel: proof, measurements, tags, verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from esper.leyline.base import Contract


class SpeedVerdict(StrEnum):
    """Whether the confidence interval of time(eager) / time(kernel) clears 1 by the margin."""

    FAST = "FAST"
    SAME = "SAME"
    SLOW = "SLOW"
    AMBIGUOUS = "AMBIGUOUS"


class Hardware(Contract):
    """Where a measurement was taken."""

    cpu: str
    isa: str
    cores: int = Field(ge=1)
    threads: int = Field(ge=1)


class Roofline(Contract):
    """What this machine reached in the measuring process itself, on its number of threads.

    Bytes a second of a triad (two arrays read, one written) over arrays far larger than every
    cache, and over arrays that fit a core's own; operations a second of a matrix product in
    `dtype`. After Williams, Waterman and Patterson, "Roofline" (2009).
    """

    memory_bytes_per_second: float = Field(gt=0)
    cache_bytes_per_second: float = Field(gt=0)
    flops_per_second: float = Field(gt=0)
    dtype: str


class Latency(Contract):
    """Single calls, one by one: raw samples in seconds, in the order they were taken."""

    seconds: tuple[float, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float | None:
        """None below a hundred samples, which have no 99th percentile."""
        if len(self.seconds) < 100:
            return None
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[98]


class Part(Contract):
    """One part of a step, forward or backward, by itself; the sides took turns.

    `speedup` is eager's median over the kernel's, `low` and `high` its 95 % bootstrap interval.
    """

    kernel: Latency
    eager: Latency
    compiled: Latency | None = None
    speedup: float
    low: float
    high: float


class Cost(Contract):
    """What one step has to do at one shape, whoever does it.

    `flops` are those of `leyline.shapes` for the forward pass, and twice as many for the
    backward, as is the custom. `bytes` are the least that any implementation moves: each
    input read once, each output and gradient written once.
    """

    flops: int = Field(ge=0)
    bytes: int = Field(gt=0)


class Measurement(Contract):
    """Kernel and eager, forward and backward together, in alternation; times in seconds.

    `speedup` is the median of eager over the median of the kernel, `low` and `high` its 95 %
    bootstrap interval. The raw samples are kept, in the order they were taken; each is a mean
    over an inner loop. What follows `eager_seconds` is None, or empty, where it was not
    measured, which is so in older reports.

    `stopped` says why no more rounds were taken: "narrow" (the interval was), "rounds" or
    "time". `compiled_seconds` are of torch.compile with static shapes, in the same rounds.
    Peaks are bytes of tensors held at once beyond what the step started with.
    """

    batch: int
    space: int
    speedup: float
    low: float
    high: float
    verdict: SpeedVerdict
    kernel_seconds: tuple[float, ...]
    eager_seconds: tuple[float, ...]
    compiled_seconds: tuple[float, ...] = ()
    stopped: str | None = None
    forward: Part | None = None
    backward: Part | None = None
    cost: Cost | None = None
    peak_bytes: int | None = None
    eager_peak_bytes: int | None = None
    note: str = ""  # why something is missing that was asked for

    @property
    def samples_per_second(self) -> float:
        """Throughput of the kernel in training: rows of the batch, forward and backward."""
        return self.batch / statistics.median(self.kernel_seconds)

    @property
    def outliers(self) -> tuple[int, ...]:
        """Rounds whose kernel sample is one; flagged, and part of every figure all the same."""
        return outliers(self.kernel_seconds)


def outliers(seconds: Sequence[float]) -> tuple[int, ...]:
    """Indices beyond Tukey's outer fences, three interquartile ranges from the quartiles."""
    if len(seconds) < 4:
        return ()
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    reach = 3 * (q3 - q1)
    return tuple(i for i, s in enumerate(seconds) if not q1 - reach <= s <= q3 + reach)


class Drift(Contract):
    """How far `steps` steps of SGD end from the same steps in float64, in one dtype.

    The distance between the parameters, over the distance that float64 travelled. `kernel` is
    the kernel's; where `dtype` is not its own, h and parameters are rounded to `dtype` before
    every call, as a host of that dtype would hand them in. `eager` computes in `dtype`.
    """

    dtype: str
    steps: int = Field(ge=1)
    kernel: float = Field(ge=0)
    eager: float = Field(ge=0)


class Risk(Contract):
    """The chance, by what is known, that a seed of this kernel is not kept.

    `basis` says where the figure comes from: the documented rules, or how many field reports
    it was fitted to and how well it did on held-out ones.
    """

    score: float = Field(ge=0, le=1)
    basis: str


class CalibrationBin(Contract):
    """Held-out reports whose predicted risk was near `predicted`, and the share that failed."""

    predicted: float
    observed: float
    count: int


class RiskCalibration(Contract):
    """How predictions did on kernels that were held out, each fold in its turn.

    Brier scores are mean squared errors of the predicted chance: lower is better. `base` is
    that of always predicting the share of failures.
    """

    reports: int
    kernels: int
    failures: int
    brier: float
    rules_brier: float
    base_brier: float
    curve: tuple[CalibrationBin, ...]


class ProofCase(Contract):
    """One input the kernel was checked on. `worst_ratio` is the largest, over out and every
    gradient, of the kernel's error against float64 over eager's own, to which half a floor of
    a few ulps is added (see `esper.urabrask.oracle`); up to 2 passes. Checks of conduct have 0."""

    name: str
    batch: int
    space: int
    worst_ratio: float
    passed: bool
    detail: str = ""


class Tag(Contract):
    """A claim about a kernel, with the figure behind it."""

    name: str
    evidence: str
    value: float


class ValidationReport(Contract):
    """`accepted` is the verdict; `reason` says why not, or is empty.

    A kernel that was refused in the proof stage is not measured: `measurements` is empty
    then, which means absent, not slow. The peaks are those at the largest measured shape.
    """

    kernel_id: str
    accepted: bool
    reason: str = ""
    proof: tuple[ProofCase, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    tags: tuple[Tag, ...] = ()
    hardware: Hardware | None = None
    peak_memory_bytes: int | None = None
    eager_peak_memory_bytes: int | None = None
    roofline: Roofline | None = None
    drift: tuple[Drift, ...] = ()
    risk: Risk | None = None
    seconds: float = Field(ge=0)

    @property
    def speedup(self) -> float | None:
        """Geometric mean over the measured shapes, None where nothing was measured."""
        if not self.measurements:
            return None
        return statistics.geometric_mean(m.speedup for m in self.measurements)

    @property
    def speedup_over_compile(self) -> float | None:
        """The same over in-process torch.compile, None where that was not measured."""
        ratios = [
            statistics.median(m.compiled_seconds) / statistics.median(m.kernel_seconds)
            for m in self.measurements if m.compiled_seconds
        ]
        return statistics.geometric_mean(ratios) if ratios else None
