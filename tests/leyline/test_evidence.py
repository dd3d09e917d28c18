"""Field reports as numbers: what each says, and how much several of them say."""

from __future__ import annotations

import math

import pytest

from esper.leyline.command import FieldReport
from esper.leyline.evidence import earned, field_evidence, worth
from esper.leyline.lifecycle import SeedState


def report(outcome: SeedState, gain: float | None, before: float | None = 2.0) -> FieldReport:
    return FieldReport(run_id="r", trace_id="t", site="s", kernel_id="k", blueprint_id="bp",
                       outcome=outcome, reason="", gain=gain, loss_before=before, epochs=1)


KEPT, CULLED = SeedState.FOSSILIZED, SeedState.CULLED


@pytest.mark.parametrize(("outcome", "gain", "before", "expected"), [
    (KEPT, 0.5, 2.0, 0.25), (KEPT, -0.5, 2.0, -0.25), (KEPT, 9.0, 2.0, 1.0),
    (KEPT, None, 2.0, None), (KEPT, math.nan, 2.0, None), (KEPT, 0.5, None, None),
    (KEPT, 0.5, 0.0, None), (KEPT, 0.5, math.inf, 0.0),
    (CULLED, -0.5, 2.0, -0.25), (CULLED, 0.5, 2.0, 0.0), (CULLED, None, None, 0.0),
    (CULLED, math.nan, 2.0, 0.0), (CULLED, -9.0, 2.0, -1.0),
    (SeedState.ROLLED_BACK, -0.5, 2.0, None), (SeedState.CANCELLED, None, None, None),
])
def test_the_worth_of_a_seed(
    outcome: SeedState, gain: float | None, before: float | None, expected: float | None
) -> None:
    assert worth(report(outcome, gain, before)) == expected


def test_few_reports_do_not_look_like_certain_gain() -> None:
    nothing, lucky, steady = earned(()), earned([0.3]), earned([0.08, 0.1, 0.12] * 3)
    assert nothing.observed is None and nothing.mean == 0 and nothing.low < 0 < nothing.high
    assert lucky.observed == 0.3 and 0 < lucky.mean < 0.3 and lucky.low < 0
    assert steady.low > 0 and steady.mean == pytest.approx(0.09)
    assert steady.deviation < earned([0.08, 0.1, 0.12]).deviation < lucky.deviation
    found = field_evidence([report(KEPT, 0.5), report(CULLED, None), report(KEPT, None)])
    assert found["bp"].reports == 2 and found["bp"].observed == 0.125
