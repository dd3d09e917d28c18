"""Field reports as tables: one row for each that says what a seed was worth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.leyline.base import sha256
from esper.leyline.command import FieldReport
from esper.leyline.evidence import worth
from esper.leyline.library import KernelRecord, Library
from esper.tamiyo.features import Matrix, kernel_facts, numbers, table

HELD_OUT_OF_TEN = 3


def held_out(run_id: str) -> bool:
    """Whether the reports of a run are for judging and never for training: three runs in ten, by
    a hash of the id, so that no version that ever was has been trained on them."""
    return int(sha256(run_id.encode())[:8], 16) % 10 < HELD_OUT_OF_TEN


@dataclass(frozen=True)
class Experience:
    """`rows` [n, features] as `features.numbers` makes them, `worth` [n], and of each row the run
    that it comes from. `until` is the time of the newest report (UTC seconds); `silent` counts
    reports that say nothing of what a seed was worth."""

    rows: Matrix
    worth: npt.NDArray[np.float64]
    runs: tuple[str, ...]
    until: float = 0.0
    silent: int = 0

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def run_count(self) -> int:
        return len(set(self.runs))

    def of_several(self) -> Experience:
        """Without the runs that have one report only."""
        several = {run for run, n in Counter(self.runs).items() if n > 1}
        return self.only([run in several for run in self.runs])

    def part(self, *, held: bool) -> Experience:
        """The part for judging (`held`), or that for training."""
        return self.only([held_out(run) is held for run in self.runs])

    def only(self, which: Sequence[bool]) -> Experience:
        """The rows that are marked."""
        taken = np.array(which, dtype=bool)
        return Experience(self.rows[taken], self.worth[taken],
                          tuple(r for r, t in zip(self.runs, which, strict=True) if t),
                          self.until)


def _known(report: FieldReport, kernels: Mapping[str, KernelRecord]) -> dict[str, Any]:
    """A report from before there were contexts still names its kernel, and that its site's kind."""
    if report.context is not None:
        return dict(report.context)
    kernel = kernels.get(report.kernel_id)
    if kernel is None:
        return {}
    return {"site": kernel.manifest.signature, **kernel_facts(kernel)}


def experience_of(
    reports: Sequence[FieldReport], kernels: Mapping[str, KernelRecord] | None = None
) -> Experience:
    """`kernels`, by id, serve those reports that have no context."""
    rows, worths, runs = [], [], []
    for report in reports:
        value = worth(report)
        if value is not None:
            rows.append(numbers(_known(report, kernels or {})))
            worths.append(value)
            runs.append(report.run_id)
    return Experience(table(rows), np.array(worths), tuple(runs),
                      # A clock that is ahead must not make all that follows old.
                      min(time.time(), max((r.time for r in reports), default=0.0)),
                      len(reports) - len(rows))


def experience_in(library: Library) -> Experience:
    """All that the field has told a library."""
    reports = library.reports()
    lacking = any(r.context is None for r in reports)
    kernels = {k.kernel_id: k for k in library.kernels()} if lacking else {}
    return experience_of(reports, kernels)
