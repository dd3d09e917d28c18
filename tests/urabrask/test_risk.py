"""Risk: rules until there are reports, then a fit that must do better on unseen kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esper.leyline.command import FieldReport
from esper.leyline.lifecycle import SeedState
from esper.urabrask import risk
from esper.urabrask.standing import Standing
from esper.urabrask.tags import Measured
from tests.urabrask.test_tags import manifest, report

BEST = manifest(), report([2.0], ratio=0.6, peak=50)
WORST = manifest(shape=(64, 64)), report([0.7], ratio=1.95, peak=190)


def _field(kernels: int, each: int, slope: float) -> tuple[list[FieldReport], dict[str, Measured]]:
    """Reports in which the chance to fail grows with a kernel's slowness, by `slope`."""
    rng = np.random.default_rng(0)
    known: dict[str, Measured] = {}
    reports = []
    for i in range(kernels):
        slowness = rng.normal()
        known[f"k-{i}"] = manifest(f"k-{i}"), report([2**-slowness], ratio=rng.uniform(0.5, 2))
        for _ in range(each):
            failed = rng.random() < 1 / (1 + np.exp(-slope * slowness))
            reports.append(FieldReport(
                run_id="r", trace_id="t", site="s", kernel_id=f"k-{i}", blueprint_id="b",
                outcome=SeedState.CULLED if failed else SeedState.FOSSILIZED, reason="", epochs=1))
    return reports, known


def test_the_rules_put_a_good_kernel_below_even_odds_and_a_bad_one_above() -> None:
    assert risk.RULES.score(BEST).score < 0.4 < 0.6 < risk.RULES.score(WORST).score
    assert "documented rules" in risk.RULES.score(BEST).basis


def test_what_was_not_measured_does_not_move_the_score() -> None:
    full = report([1.0], ratio=1.0, peak=100)
    bare = full.model_copy(
        update={"measurements": (), "proof": (), "peak_memory_bytes": None}
    )
    assert risk.RULES.score((manifest(), bare)).score == 0.5


def test_few_reports_leave_the_rules_alone() -> None:
    reports, known = _field(20, 2, 3.0)
    assert risk.learn(reports, known) is risk.RULES
    assert risk.learn(reports * 2, {}) is risk.RULES  # of unknown kernels


def test_a_fit_that_helps_replaces_the_rules_and_shows_its_calibration() -> None:
    reports, known = _field(60, 5, 3.0)
    model = risk.learn(reports, known)
    assert model.fitted
    c = model.calibration
    assert c is not None and c.reports == 300 and c.kernels == 60
    assert c.brier < min(c.rules_brier, c.base_brier)
    assert sum(b.count for b in c.curve) == 300
    worst_gap = max(abs(b.predicted - b.observed) for b in c.curve)
    assert worst_gap < 0.25, c.curve
    good, bad = (manifest("a"), report([4.0])), (manifest("b"), report([0.25]))
    assert model.score(good).score < 0.2 < 0.8 < model.score(bad).score
    assert "fitted to 300 field reports" in model.score(good).basis


def test_the_coefficients_say_what_the_pipeline_says() -> None:
    reports, known = _field(60, 5, 3.0)
    model = risk.learn(reports, known)
    names = [k for k, _ in risk.usable(reports, known)]
    failed = [f for _, f in risk.usable(reports, known)]
    x = risk._matrix([known[k] for k in names])
    theirs = risk._pipeline().fit(x, failed).predict_proba(x)[:, 1]
    ours = [model.score(known[k]).score for k in names]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_a_fit_to_noise_does_not_replace_the_rules_but_is_shown() -> None:
    model = risk.learn(*_field(60, 5, 0.0))
    c = model.calibration
    assert c is not None
    assert model.fitted == (c.brier < min(c.rules_brier, c.base_brier))
    assert c.brier > 0.2  # nothing can be known of a coin


def test_withdrawn_seeds_say_nothing_and_rollbacks_count() -> None:
    reports, known = _field(1, 1, 0.0)
    for outcome, counted in ((SeedState.CANCELLED, 0), (SeedState.ROLLED_BACK, 1)):
        changed = [r.model_copy(update={"outcome": outcome}) for r in reports]
        assert len(risk.usable(changed, known)) == counted


def test_a_model_survives_json() -> None:
    model = risk.learn(*_field(60, 5, 3.0))
    again = risk.Model.model_validate_json(model.model_dump_json())
    assert again == model and again.score(BEST) == model.score(BEST)


class _Shelf:
    """Only what `Standing` asks of a library."""

    def __init__(self, reports: list[FieldReport], known: dict[str, Measured]) -> None:
        self._reports, self._known = reports, known

    def reports(self) -> list[FieldReport]:
        return self._reports

    def kernels(self, **_: object) -> list[object]:
        from types import SimpleNamespace

        return [SimpleNamespace(kernel_id=k, manifest=m, report=r)
                for k, (m, r) in self._known.items()]


@pytest.mark.parametrize(("each", "fitted"), [(5, True), (0, False)])
def test_reports_are_placed_and_the_model_is_written(
    tmp_path: Path, each: int, fitted: bool
) -> None:
    standing = Standing(_Shelf(*_field(60, each, 3.0)), tmp_path / "risk.json")  # type: ignore[arg-type]
    placed = standing.place(*BEST)
    assert placed.risk is not None and 0 < placed.risk.score < 0.5
    assert placed.tags
    assert (tmp_path / "risk.json").exists() is fitted
    if fitted:
        model = risk.Model.model_validate_json((tmp_path / "risk.json").read_text())
        assert model.fitted and model.score(BEST) == placed.risk
