"""What Urabrask says about a kernel: proof, measurements, tags, verdict."""

from __future__ import annotations

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


class Measurement(Contract):
    """Kernel and eager, forward and backward together, in alternation; times in seconds.

    `speedup` is the median of eager over the median of the kernel, `low` and `high` its 95 %
    bootstrap interval. The raw samples are kept, in the order they were taken.
    """

    batch: int
    space: int
    speedup: float
    low: float
    high: float
    verdict: SpeedVerdict
    kernel_seconds: tuple[float, ...]
    eager_seconds: tuple[float, ...]


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
    then, which means absent, not slow.
    """

    kernel_id: str
    accepted: bool
    reason: str = ""
    proof: tuple[ProofCase, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    tags: tuple[Tag, ...] = ()
    hardware: Hardware | None = None
    peak_memory_bytes: int | None = None
    seconds: float = Field(ge=0)

    @property
    def speedup(self) -> float | None:
        """Geometric mean over the measured shapes, None where nothing was measured."""
        if not self.measurements:
            return None
        product = 1.0
        for m in self.measurements:
            product *= m.speedup
        return float(product ** (1 / len(self.measurements)))
