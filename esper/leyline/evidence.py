"""What field reports say of a blueprint: the one place where a report becomes a number.

Tamiyo's choice, Karn's breeding, Simic's training and the reports for people all read it here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from esper.leyline.command import FieldReport
from esper.leyline.lifecycle import SeedState

# What is believed of a seed's worth before anything is known of its kind: the weight of one report
# of zero, and of two that scatter by a twentieth of the loss.
PRIOR_REPORTS, PRIOR_FREEDOM, PRIOR_SPREAD = 1.0, 2.0, 0.05


def speaks(report: FieldReport) -> bool:
    """Whether a report says anything about its blueprint. What was withdrawn or rolled back with
    the whole run does not, nor does a fossil that nobody measured."""
    if report.outcome is SeedState.CULLED:
        return True
    gain = report.gain
    return report.outcome is SeedState.FOSSILIZED and gain is not None and math.isfinite(gain)


def worth(report: FieldReport) -> float | None:
    """What the seed was worth to its run: its gain as a share of the held-out loss without it, in
    [-1, 1]; None where the report does not say.

    A seed that was culled left its host as it was: its worth is zero, or what it would have
    cost, never a gain that was not kept.
    """
    if not speaks(report):
        return None
    gain, before = report.gain, report.loss_before
    if gain is None or before is None or not math.isfinite(gain / before if before else math.nan):
        return 0.0 if report.outcome is SeedState.CULLED else None
    share = max(-1.0, min(1.0, gain / abs(before)))
    return min(0.0, share) if report.outcome is SeedState.CULLED else share


@dataclass(frozen=True)
class Earned:
    """What is known from `reports` worths: their mean as observed, and what to believe of it.

    `mean` and `deviation` are those of the posterior of the expected worth: few reports leave
    it near zero, and wide. A normal model of unknown mean and variance with a conjugate prior
    (Murphy, Conjugate Bayesian analysis of the Gaussian distribution, 2007).
    """

    reports: int
    observed: float | None
    mean: float
    deviation: float

    @property
    def low(self) -> float:
        """The lower end of two deviations."""
        return self.mean - 2 * self.deviation

    @property
    def high(self) -> float:
        return self.mean + 2 * self.deviation


def earned(worths: Sequence[float]) -> Earned:
    """See `Earned`."""
    n = len(worths)
    observed = fmean(worths) if n else 0.0
    weight, freedom = PRIOR_REPORTS + n, PRIOR_FREEDOM + n
    scatter = sum((w - observed) ** 2 for w in worths)
    pull = PRIOR_REPORTS * n / weight * observed**2
    variance = (PRIOR_FREEDOM * PRIOR_SPREAD**2 + scatter + pull) / freedom
    # Of Student's t with `freedom` degrees; with two of them it has none, and is taken as with 3.
    wide = max(freedom, 3.0) / (max(freedom, 3.0) - 2)
    return Earned(n, observed if n else None, n * observed / weight,
                  math.sqrt(variance / weight * wide))


def worths_of(reports: Iterable[FieldReport]) -> dict[str, list[float]]:
    """Every worth that is known, by blueprint, in the order of the reports."""
    found: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        if (value := worth(report)) is not None:
            found[report.blueprint_id].append(value)
    return dict(found)


def field_evidence(reports: Iterable[FieldReport]) -> dict[str, Earned]:
    """By blueprint; one of which no report speaks is not in it."""
    return {blueprint: earned(worths) for blueprint, worths in worths_of(reports).items()}
