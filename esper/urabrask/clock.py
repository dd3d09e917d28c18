"""The clock that samples are taken with, and another one that watches it.

A kernel runs in the process that measures it and could bend the clock: replace Python's
functions, or the C library's `clock_gettime` behind them. The witness asks the operating
system for the same clock by the number of the call, past the C library and its shortcuts;
the two must agree on every sample. This finds a bent clock, not every conceivable one: code
in the same process that forges system calls could as well write the report.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

# Bound before any kernel is opened.
clock = time.perf_counter
_WATCHED = {
    f"{module.__name__}.{name}": (module, name, getattr(module, name))
    for module, names in (
        (time, ("perf_counter", "perf_counter_ns", "monotonic", "time", "process_time", "sleep")),
        (os, ("times",)),
    )
    for name in names
}
_CALLS = {"x86_64": 228, "aarch64": 113}  # clock_gettime in the system's tables for Linux
TOLERANCE = 0.05


def replaced() -> str:
    """The reason where one of Python's own clocks is not what it was at import, or ""."""
    for name, (module, attribute, original) in _WATCHED.items():
        if getattr(module, attribute) is not original:
            return f"the kernel replaces {name}"
    return ""


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def _by_system_call(number: int) -> Callable[[], float]:
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    now = _Time()
    where = ctypes.byref(now)
    numbers = ctypes.c_long(number), ctypes.c_long(time.CLOCK_MONOTONIC)

    def read() -> float:
        call(*numbers, where)
        return now.seconds + now.nanoseconds * 1e-9

    return read


def _by_ticks() -> float:
    return os.times().elapsed


# Elsewhere the system's ticks, a hundred a second: coarse, but not the C library's clock.
witness: Callable[[], float] = (
    _by_system_call(_CALLS[platform.machine()])
    if sys.platform == "linux" and platform.machine() in _CALLS
    else _by_ticks
)
_PRECISE = witness is not _by_ticks


def _both() -> tuple[float, float]:
    """Both clocks at one moment: of three readings the one that was least interrupted."""
    readings = []
    for _ in range(3):
        before, seen, after = clock(), witness(), clock()
        readings.append((after - before, before, seen))
    _, now, seen = min(readings)
    return now, seen


class Watch:
    """Compares the two clocks, sample by sample and over all of the time it is used."""

    def __init__(self, sides: int) -> None:
        self._ratios: list[list[float]] = [[] for _ in range(sides)]
        self._started = _both()

    def add(self, side: int, seconds: float, seen: float) -> None:
        """A sample of `side` that took `seconds` by the clock and `seen` by the witness."""
        if _PRECISE and seen > 0:
            self._ratios[side].append(seconds / seen)

    def objection(self) -> str:
        """Why the samples are not to be believed, or "".

        The median of a side's samples counts, as in the verdict: one that was interrupted
        between two readings says nothing.
        """
        if reason := replaced():
            return reason
        passed, seen = (b - a for a, b in zip(self._started, _both(), strict=True))
        if abs(passed - seen) > TOLERANCE * seen + 0.03:  # three ticks, where that is all there is
            return (
                f"the clock disagrees with the system's: {passed:.3g} s passed by the one, "
                f"{seen:.3g} s by the other"
            )
        for ratios in filter(None, self._ratios):
            if abs((middle := statistics.median(ratios)) - 1) > TOLERANCE:
                return (
                    f"a sample takes {middle:.3g} times as long by the C library's clock as by "
                    "the system's own"
                )
        return ""
