"""Alpha schedules: how a seed is blended in, as a function of the share of steps done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Schedule = Callable[[float], float]
"""Maps progress in [0, 1] to alpha in [0, 1]; monotone, 0 at 0 and 1 at 1."""


def linear(progress: float) -> float:
    return progress


def cosine(progress: float) -> float:
    """Half a cosine: slow at both ends (Loshchilov and Hutter 2017, run upwards)."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)


def sigmoid(progress: float, steepness: float = 10.0) -> float:
    """A logistic curve around the middle, rescaled to meet 0 and 1 exactly."""
    low = 1 / (1 + math.exp(steepness / 2))
    raw = 1 / (1 + math.exp(-steepness * (progress - 0.5)))
    return min(1.0, max(0.0, (raw - low) / (1 - 2 * low)))


SCHEDULES: Mapping[str, Schedule] = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}
