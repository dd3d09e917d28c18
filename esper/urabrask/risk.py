"""Risk: the chance that a seed of a kernel is not kept, from what Urabrask measured.

A model is logistic: sigmoid(intercept + sum of weight * (feature - centre) / scale), where a
feature that was not measured adds nothing, as an average one would. It starts as `RULES`,
set by hand and documented there. Once field reports suffice, `learn` fits the same form to
them and says how it does on kernels it has not seen. It replaces the rules only where it is
better there than they are, and than the plain share of failures. A model is stored as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.leyline.base import Contract
from esper.leyline.command import FieldReport
from esper.leyline.lifecycle import SeedState
from esper.leyline.verdict import CalibrationBin, Risk, RiskCalibration
from esper.urabrask.tags import (
    Measured,
    memory_ratio,
    parameter_count,
    stress_ratio,
    worst_ratio,
)

MIN_REPORTS = 60
MIN_EACH = 15  # kept, and not kept
FOLDS = 5
BINS = 5

# Withdrawn is nobody's fault; a rollback takes the seeds that were active with it, and one of
# them may well have been the cause.
KEPT = {SeedState.FOSSILIZED}
NOT_KEPT = {SeedState.CULLED, SeedState.ROLLED_BACK}


def _slowness(m: Measured) -> float | None:
    speedup = m[1].speedup
    return None if not speedup else -math.log2(speedup)


def _memory(m: Measured) -> float | None:
    ratio = memory_ratio(m)
    return None if not ratio else math.log2(ratio)


def _size(m: Measured) -> float:
    return math.log2(max(1, parameter_count(m[0])) / m[0].signature.channels ** 2)


def _drift(m: Measured) -> float | None:
    own = [d for d in m[1].drift if d.dtype == m[0].signature.dtype and d.kernel and d.eager]
    return math.log2(own[0].kernel / own[0].eager) if own else None


FEATURES: Mapping[str, Callable[[Measured], float | None]] = {
    "precision": worst_ratio,  # 2 is the most that is allowed, eager's own is about 1
    "stability": stress_ratio,
    "slowness": _slowness,  # in doublings of eager's time
    "memory": _memory,  # in doublings of eager's peak
    "size": _size,  # in doublings of one dense layer
    "drift": _drift,  # in doublings of eager's drift
}


class Term(Contract):
    """One feature's part in the score."""

    feature: str
    weight: float
    centre: float = 0.0
    scale: float = 1.0


class Model(Contract):
    """Coefficients in the log-odds of failure. `calibration` is of the fitted form, whether
    or not it was good enough to replace the rules; `fitted` says which these are."""

    version: int = 1
    fitted: bool = False
    intercept: float
    terms: tuple[Term, ...]
    calibration: RiskCalibration | None = None

    @property
    def basis(self) -> str:
        """Where the figures come from, in words."""
        c = self.calibration
        if c is None:
            return f"documented rules; there are fewer than {MIN_REPORTS} usable field reports"
        words = (
            f"Brier score {c.brier:.3f} on held-out kernels, the rules' {c.rules_brier:.3f}, "
            f"the base rate's {c.base_brier:.3f}"
        )
        if self.fitted:
            return f"fitted to {c.reports} field reports on {c.kernels} kernels; {words}"
        return f"documented rules, for a fit to {c.reports} field reports was no better; {words}"

    def score(self, measured: Measured) -> Risk:
        """The risk of one kernel."""
        found = {t.feature: FEATURES[t.feature](measured) for t in self.terms}
        z = self.intercept
        for t in self.terms:
            value = found[t.feature]
            if value is not None and math.isfinite(value):
                z += t.weight * (value - t.centre) / t.scale
        return Risk(score=1 / (1 + math.exp(-max(-30.0, min(30.0, z)))), basis=self.basis)


# By hand. An average kernel, as precise as eager, as fast, as large as a dense layer, is even
# odds. Errors near the limit are the one sign of trouble that was measured directly, so they
# weigh most; a slow or hungry kernel is culled sooner by a policy that counts its cost; and a
# large one has more to learn before it shows a gain.
RULES = Model(
    intercept=0.0,
    terms=(
        Term(feature="precision", weight=1.0, centre=1.0),
        Term(feature="stability", weight=1.0, centre=1.0),
        Term(feature="slowness", weight=0.5),
        Term(feature="memory", weight=0.5),
        Term(feature="size", weight=0.25),
        Term(feature="drift", weight=0.5),
    ),
)


def usable(
    reports: Iterable[FieldReport], kernels: Mapping[str, Measured]
) -> list[tuple[str, bool]]:
    """(kernel, whether it failed) of every report that says so, of a kernel that is known."""
    return [
        (r.kernel_id, r.outcome in NOT_KEPT)
        for r in reports
        if r.kernel_id in kernels and r.outcome in KEPT | NOT_KEPT
    ]


def learn(reports: Sequence[FieldReport], kernels: Mapping[str, Measured]) -> Model:
    """The best model that `reports` support, with its calibration; `RULES` where too few do."""
    cases = usable(reports, kernels)
    failed = np.array([f for _, f in cases], dtype=bool)
    names = [k for k, _ in cases]
    # Held out by kernel: what is asked is how a kernel will do that was never seen. So kernels
    # of both outcomes must be there for every fold.
    outcomes = [{k for k, f in cases if f is bad} for bad in (True, False)]
    if (
        len(cases) < MIN_REPORTS
        or min(failed.sum(), (~failed).sum()) < MIN_EACH
        or min(map(len, outcomes)) < 2 * FOLDS
    ):
        return RULES
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    x = _matrix([kernels[k] for k in names])
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    held_out = cross_val_predict(
        _pipeline(), x, failed, groups=names, cv=split, method="predict_proba"
    )[:, 1]
    base = np.empty(len(failed))
    for train, test in split.split(x, failed, names):
        base[test] = failed[train].mean()
    by_rules = [RULES.score(kernels[k]).score for k in names]
    observed, predicted = calibration_curve(failed, held_out, n_bins=BINS, strategy="quantile")
    calibration = RiskCalibration(
        reports=len(cases), kernels=len(set(names)), failures=int(failed.sum()),
        brier=float(brier_score_loss(failed, held_out)),
        rules_brier=float(brier_score_loss(failed, by_rules)),
        base_brier=float(brier_score_loss(failed, base)),
        curve=tuple(
            CalibrationBin(predicted=float(p), observed=float(o), count=n)
            for p, o, n in zip(predicted, observed, _counts(held_out), strict=True)
        ),
    )
    if calibration.brier >= min(calibration.rules_brier, calibration.base_brier):
        return RULES.model_copy(update={"calibration": calibration})
    return _coefficients(_pipeline().fit(x, failed), calibration)


def _matrix(measured: Sequence[Measured]) -> npt.NDArray[np.float64]:
    rows = [[f(m) for f in FEATURES.values()] for m in measured]
    return np.array(
        [[np.nan if v is None or not math.isfinite(v) else v for v in row] for row in rows],
        dtype=np.float64,
    )


def _pipeline() -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # A feature that nobody has measured becomes a constant, and counts for nothing.
    return make_pipeline(
        SimpleImputer(strategy="mean", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(),
    )


def _counts(predicted: npt.NDArray[np.float64]) -> list[int]:
    """How many fall into each bin of `calibration_curve(strategy="quantile")`."""
    edges = np.percentile(predicted, np.linspace(0, 100, BINS + 1))
    found = np.searchsorted(edges[1:-1], predicted)
    counts = np.bincount(found, minlength=BINS)
    return [int(n) for n in counts if n]


def _coefficients(fitted: Any, calibration: RiskCalibration) -> Model:
    """A fitted pipeline as plain figures. An absent feature is imputed with the mean, which is
    the centre, so it adds nothing there as it does here."""
    _, scaler, regression = (step for _, step in fitted.steps)
    return Model(
        fitted=True,
        intercept=float(regression.intercept_[0]),
        terms=tuple(
            Term(feature=name, weight=float(w), centre=float(c), scale=float(s))
            for name, w, c, s in zip(
                FEATURES, regression.coef_[0], scaler.mean_, scaler.scale_, strict=True
            )
        ),
        calibration=calibration,
    )
