"""Intervals by the bootstrap (Efron 1979): the seeds are drawn anew, with replacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic of some values and its 95 % percentile interval; a bound is None where it is
    infinite, or where fewer than two values say nothing of their spread."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def estimate(
    values: Sequence[float],
    statistic: Callable[..., npt.NDArray[np.float64]] = np.mean,
) -> Estimate:
    """`statistic` is one of numpy's that takes `axis`. Infinite values (a target that was never
    reached) have their place in the order: give them to np.median, never to np.mean."""
    if not values:
        return Estimate(None, None, None, 0)
    given = np.asarray(values, dtype=np.float64)
    value = _finite(float(statistic(given, axis=0)))
    if len(given) < 2:
        return Estimate(value, None, None, 1)
    chosen = np.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    with np.errstate(invalid="ignore"):
        drawn = statistic(given[chosen], axis=1)
        tail = 100 * (1 - LEVEL) / 2
        # Of two neighbours of which one is infinite nothing lies between.
        low, high = np.percentile(drawn, [tail, 100 - tail], method="nearest")
    return Estimate(value, _finite(float(low)), _finite(float(high)), len(given))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
