"""Training: a Bayesian linear model of what a seed is worth.

The weights of data and prior are those that make the reports likeliest (evidence approximation:
MacKay, Bayesian interpolation, 1992), so nothing is tuned by hand and few reports give a timid
model. The reward is `evidence.worth`: the gain as a share of the loss, nothing or less for what
was culled. What a seed costs is not taken off: costs are what a policy's budgets are for.
"""

from __future__ import annotations

import math

import numpy as np
from sklearn.linear_model import BayesianRidge

from esper.simic.experience import Experience
from esper.tamiyo.bandit import LinearModel
from esper.tamiyo.features import FEATURES, fit_columns

MIN_NOISE = 1e-6


def fit(experience: Experience, used: tuple[str, ...] = FEATURES) -> LinearModel:
    """A model of the worths in `experience` from the features `used`."""
    columns = fit_columns(experience.rows, used)
    x = columns(experience.rows)
    ridge = BayesianRidge().fit(x, experience.worth)
    covariance = np.asarray(ridge.sigma_)
    # What all reports agree in has no covariance left to invert, in floating point.
    precision = np.linalg.pinv((covariance + covariance.T) / 2, hermitian=True)
    precision = (precision + precision.T) / 2 + 1e-9 * np.eye(columns.size)
    return LinearModel(
        columns=columns, intercept=float(ridge.intercept_),
        coefficients=tuple(np.asarray(ridge.coef_).tolist()),
        precision=tuple(tuple(row) for row in precision.tolist()),
        noise=max(MIN_NOISE, 1 / math.sqrt(float(ridge.alpha_))), until=experience.until)
