"""Is a new version better than the one before? Both predict the worth of seeds of held-out runs.

What can be judged offline, and what cannot. The reports say what became of the seeds that were
chosen; of those that were not chosen, nothing is known, and reports do not list them. Replay (Li
et al., Unbiased offline evaluation, WSDM 2011) and inverse propensity need that list and the
probabilities of a policy that draws; the heuristic's are 0 and 1. So neither is used, and no value
of a policy is claimed. Judged is the model that a policy ranks by: its error on worths it has never
seen, and whether it orders them. That is fair between two models, for what decided a choice is
among their inputs; how well a model does where no policy ever went, it does not say.

All candidates of a choice are of one run and one moment, so what all seeds of a run share, and
what the moment explains, is no matter of choice: from worths and predictions alike each run's mean
is taken off, and then what is linear in the features of the moment. A run of one seed says nothing
then. Runs are also what is drawn anew, for their seeds share data and noise (cluster bootstrap:
Cameron, Gelbach and Miller, 2008). Held-out runs are the same for all versions for ever.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from esper.simic.experience import Experience
from esper.simic.versions import Score, Verdict
from esper.tamiyo.bandit import LinearModel
from esper.tamiyo.features import FEATURES, OF_MOMENT

RESAMPLES = 2000
# At 95 %, versions trained on equally many other runs of one world beat one another in 5 to 9 of
# 100 repeats, for one of them is always a little better; at 98 % in 1 to 5.
CONFIDENCE = 0.98
Vector = npt.NDArray[np.float64]


def _score(predicted: Vector, worth: Vector) -> Score:
    ordered = len(worth) > 2 and np.ptp(predicted) > 1e-12 and np.ptp(worth) > 1e-12
    return Score(error=float(np.sqrt(np.mean((predicted - worth) ** 2))),
                 rank=float(spearmanr(predicted, worth).statistic) if ordered else None)


def compare(
    new: LinearModel, old: LinearModel, held: Experience, rival: str, seed: int = 0
) -> Verdict:
    """Judge both on reports that neither was trained on; there has to be one."""
    names, of_run = np.unique(np.array(held.runs), return_inverse=True)
    count = np.bincount(of_run)

    def within(values: Vector) -> Vector:
        centred: Vector = values - (np.bincount(of_run, values) / count)[of_run]
        return centred

    moment = np.stack([within(np.nan_to_num(held.rows[:, FEATURES.index(name)]))
                       for name in OF_MOMENT], axis=1)

    def chosen(values: Vector) -> Vector:
        centred = within(values)
        left: Vector = centred - moment @ np.linalg.lstsq(moment, centred, rcond=None)[0]
        return left

    worth = chosen(held.worth)
    predictions = [chosen(model.predict(held.rows)) for model in (new, old)]
    squares = [np.bincount(of_run, (p - worth) ** 2, len(names)) for p in predictions]
    gained = squares[1] - squares[0]
    draws = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    shares = gained[draws].sum(axis=1) / np.maximum(squares[1][draws].sum(axis=1), 1e-300)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(shares, (tail, 1 - tail))
    return Verdict(
        rival=rival, runs=len(names), reports=len(held), new=_score(predictions[0], worth),
        old=_score(predictions[1], worth),
        better=float(gained.sum() / max(squares[1].sum(), 1e-300)), low=float(low),
        high=float(high))
