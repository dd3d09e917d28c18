"""A contextual bandit: it learns from field reports which site and kernel promise how much.

Linear Thompson sampling (Agrawal and Goyal, Thompson sampling for contextual bandits with linear
payoffs, ICML 2013): the expected worth of a seed is linear in what is known beforehand, its
coefficients are normal; one set of them is drawn per decision, and who is best under that set is
taken. So what is little known is tried as often as it may be the best, and no oftener.

What it starts from is a version that Simic trained and promoted. Reports that came after that
version was made are learned at the next decision, by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from esper.leyline.base import Contract
from esper.leyline.command import FieldReport
from esper.leyline.evidence import field_evidence, worth
from esper.tamiyo.choice import Candidate
from esper.tamiyo.features import (
    FEATURES,
    Columns,
    Matrix,
    field_facts,
    field_numbers,
    kernel_facts,
    kernel_numbers,
    moment_facts,
    moment_numbers,
    numbers,
    site_facts,
    site_numbers,
    table,
)
from esper.tamiyo.state import Catalog, SystemState

Vector = npt.NDArray[np.float64]
MAX_COLUMNS = 256


class LinearModel(Contract):
    """The worth of a seed is `intercept` + x . c + noise, x made by `columns`, c normal with mean
    `coefficients` and inverse covariance `precision`; `noise` is a standard deviation. Worths are
    shares of the held-out loss (see `evidence.worth`). Reports up to `until` (UTC seconds) are
    in it.
    """

    columns: Columns
    intercept: float = Field(allow_inf_nan=False)
    coefficients: tuple[float, ...] = Field(max_length=MAX_COLUMNS)
    precision: tuple[tuple[float, ...], ...] = Field(max_length=MAX_COLUMNS)
    noise: float = Field(gt=0, allow_inf_nan=False)
    until: float

    @model_validator(mode="after")
    def _fits_together(self) -> LinearModel:
        c = self.columns
        if unknown := [n for n in (*c.used, *c.lacking) if n not in FEATURES]:
            raise ValueError(f"features {', '.join(unknown)} are not known to this version of "
                             "esper; train anew: esper simic train")
        if len(c.mean) != len(c.used) or len(c.scale) != len(c.used) or not set(
                c.lacking) <= set(c.used) or any(s <= 0 for s in c.scale):
            raise ValueError("means, scales and features do not fit together")
        if len(self.coefficients) != c.size or len(self.precision) != c.size or any(
                len(row) != c.size for row in self.precision):
            raise ValueError(f"{c.size} columns need as many coefficients, and a square of them")
        if not all(map(math.isfinite, (*self.coefficients, *(v for r in self.precision
                                                             for v in r)))):
            raise ValueError("a coefficient or its precision is not finite")
        return self

    def predict(self, rows: Matrix) -> Vector:
        """Expected worths [n] of rows of features [n, len(FEATURES)]."""
        predicted: Vector = self.columns(rows) @ np.array(self.coefficients) + self.intercept
        return predicted


class Bandit:
    """A `Chooser`. `version` is the name that reasons and reports bear; `seed` decides the draws.

    State (see `state_dict`) is plain values and goes into the run's checkpoints.
    """

    def __init__(self, model: LinearModel, version: str, seed: int = 0) -> None:
        self.version = version
        self._model = model
        self._random = np.random.default_rng(seed)
        self._precision: Matrix = np.array(model.precision).reshape(2 * (model.columns.size,))
        self._weighted: Vector = self._precision @ np.array(model.coefficients)
        self._learned: set[str] = set()
        self._kernels: dict[tuple[str, bool], tuple[float, ...]] = {}  # what does not change

    def learn(self, reports: Iterable[FieldReport]) -> int:
        """Take in reports that the model does not have yet; returns how many were news. Those
        without a context say nothing of a choice, and are left to Simic."""
        rows, worths = [], []
        for report in reports:
            if (report.context is not None and report.time > self._model.until
                    and report.report_id not in self._learned
                    and (value := worth(report)) is not None):
                self._learned.add(report.report_id)
                rows.append(numbers(dict(report.context)))
                worths.append(value)
        if rows:
            x = self._model.columns(table(rows))
            y = np.array(worths) - self._model.intercept
            self._precision += x.T @ x / self._model.noise**2
            self._weighted += x.T @ y / self._model.noise**2
        return len(rows)

    def _rows(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Matrix:
        evidence = field_evidence(catalog.reports)
        moment = moment_numbers(moment_facts(state))
        sites: dict[str, tuple[float, ...]] = {}
        fared: dict[str, tuple[float, ...]] = {}
        rows = []
        for c in candidates:
            blueprint = c.kernel.blueprint_id
            if c.site.name not in sites:
                sites[c.site.name] = site_numbers(site_facts(c.site, state))
            if blueprint not in fared:
                fared[blueprint] = field_numbers(field_facts(evidence.get(blueprint)))
            key = (c.kernel.kernel_id, c.kernel.report is None)
            if key not in self._kernels:
                self._kernels[key] = kernel_numbers(kernel_facts(c.kernel))
            rows.append((*sites[c.site.name], *moment, *self._kernels[key], *fared[blueprint]))
        return table(rows)

    def values(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Sequence[tuple[float, str]]:
        """See `Chooser`. A value is a worth under coefficients drawn for this decision."""
        self.learn(catalog.reports)
        if not candidates:
            return []
        x = self._model.columns(self._rows(candidates, state, catalog))
        lower = np.linalg.cholesky(self._precision)
        mean = np.linalg.solve(self._precision, self._weighted)
        drawn = mean + np.linalg.solve(lower.T, self._random.standard_normal(len(mean)))
        expected = x @ mean + self._model.intercept
        deviation = np.sqrt((np.linalg.solve(lower, x.T) ** 2).sum(axis=0))
        values = x @ drawn + self._model.intercept
        said = [f"{self.version} expects a worth of {m:+.2g} ± {d:.2g} of the loss"
                for m, d in zip(expected.tolist(), deviation.tolist(), strict=True)]
        best = int(np.argmax(values))
        said[best] += f", and drew {values[best]:+.2g}"
        return list(zip(values.tolist(), said, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "random": self._random.bit_generator.state,
                "precision": self._precision.tolist(), "weighted": self._weighted.tolist(),
                "learned": sorted(self._learned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of a bandit of the same version.

        Raises:
            ValueError: it is of another version.
        """
        if state_dict["version"] != self.version:
            raise ValueError(f"the run was made with {state_dict['version']}, this is "
                             f"{self.version}; resume it with the version it began with")
        self._random.bit_generator.state = state_dict["random"]
        self._precision = np.array(state_dict["precision"])
        self._weighted = np.array(state_dict["weighted"])
        self._learned = set(state_dict["learned"])
