"""The bandit: it finds what is better, with few trials, and says what it does not know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from pydantic import ValidationError

from esper.leyline.command import Action, Command, FieldReport
from esper.leyline.lifecycle import SeedState
from esper.simic.experience import experience_of
from esper.simic.train import fit
from esper.tamiyo.bandit import Bandit, LinearModel
from esper.tamiyo.choice import Candidate
from esper.tamiyo.features import FEATURES, context_of, fit_columns, numbers
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SiteStatus, SystemState
from tests.simic.world import SIGNATURE, Choose, World


@pytest.fixture(scope="module")
def few() -> list[FieldReport]:
    return World(seed=3).runs(20)


@pytest.fixture(scope="module")
def model(few: list[FieldReport]) -> LinearModel:
    return fit(experience_of(few))


def choosing(bandit: Bandit) -> Choose:
    def choose(candidates: Sequence[Candidate], state: SystemState, catalog: Catalog) -> int:
        values = bandit.values(candidates, state, catalog)
        return max(range(len(values)), key=lambda i: values[i][0])

    return choose


def situation() -> tuple[list[Candidate], SystemState, Catalog]:
    sites = tuple(SiteStatus(f"s{i}", SIGNATURE, SeedState.DORMANT, score=1.0 + i, fossils=i)
                  for i in range(3))
    state = SystemState(5, (2.0, 1.0), (2.0, 1.5), sites, 0, 2)
    kernels = tuple(k for _, k in World().kernels)
    reports = (FieldReport(
        run_id="r", trace_id="t", site="s0", kernel_id=kernels[0].kernel_id, reason="", epochs=3,
        blueprint_id=kernels[0].blueprint_id, outcome=SeedState.FOSSILIZED, gain=0.1,
        loss_before=1.0),)
    return ([Candidate(s, k, 0, None) for s in sites for k in kernels], state,
            Catalog(kernels, reports))


def test_what_is_reported_is_what_was_decided_on(model: LinearModel) -> None:
    candidates, state, catalog = situation()
    rows = Bandit(model, "bandit-1")._rows(candidates, state, catalog)
    for row, c in zip(rows, candidates, strict=True):
        command = Command(action=Action.GERMINATE, site=c.site.name,
                          kernel_id=c.kernel.kernel_id, reason="")
        context = context_of(command, state, catalog, None)
        assert context is not None
        np.testing.assert_array_equal(row, numbers(dict(context)))
    known = dict(zip(FEATURES, rows[0], strict=True))
    assert (known["depth"], known["relative_score"], known["loss_share"]) == (
        0, pytest.approx(1 / 3), 0.75)
    assert known["untried"] == 0 and known["earned"] == pytest.approx(0.05)
    assert np.isnan(dict(zip(FEATURES, rows[1], strict=True))["earned"]), "untried is not zero"


def test_regret_falls_with_a_version_and_further_as_reports_come_in(model: LinearModel) -> None:
    """Of 20 runs: as the seeds come, by a version trained on 20 others, and by one that learns."""

    def regrets(choose: Choose | None) -> list[float]:
        world = World(seed=4)
        world.runs(20, choose)
        return world.regrets

    chance = fmean(regrets(None))
    frozen = regrets(choosing(Bandit(model.model_copy(update={"until": 1e12}), "bandit-1")))
    learning = regrets(choosing(Bandit(model.model_copy(update={"until": 0.0}), "bandit-1")))
    assert fmean(frozen) < 0.4 * chance and fmean(learning) < fmean(frozen)
    assert fmean(learning[-40:]) < 0.6 * fmean(learning[:40])


def test_few_reports_leave_a_wide_posterior_and_more_narrow_it(model: LinearModel) -> None:
    candidates, state, catalog = situation()
    bandit = Bandit(model, "bandit-1")

    def spread() -> float:
        draws = [[v for v, _ in bandit.values(candidates, state, catalog)] for _ in range(100)]
        return float(np.array(draws).std(axis=0).mean())

    before = spread()
    assert bandit.learn(r.model_copy(update={"time": r.time + 1e8})
                        for r in World(seed=6).runs(60)) == 360
    assert spread() < before
    assert bandit.learn(catalog.reports) == 0, "a report without a context is Simic's"


def test_it_goes_on_from_its_state_as_if_nothing_had_been(model: LinearModel) -> None:
    candidates, state, catalog = situation()
    one = Bandit(model, "bandit-1", seed=1)
    one.values(candidates, state, catalog)
    kept = json.loads(json.dumps(one.state_dict()))
    other = Bandit(model, "bandit-1", seed=2)
    other.load_state_dict(kept)
    assert one.values(candidates, state, catalog) == other.values(candidates, state, catalog)
    with pytest.raises(ValueError, match="made with bandit-1, this is bandit-2"):
        Bandit(model, "bandit-2").load_state_dict(kept)
    assert one.values([], state, catalog) == []


def test_a_policy_germinates_what_the_bandit_values_most(model: LinearModel) -> None:
    _, state, catalog = situation()
    policy = HeuristicPolicy(chooser=Bandit(model, "bandit-1", seed=5))
    assert policy.version == "bandit-1"
    decision = policy.decide(state, catalog)
    (command,) = decision.commands
    (taken,) = (c for c in decision.considered if c.chosen)
    assert (command.site, command.kernel_id) == (taken.site, taken.kernel_id)
    assert "bandit-1 expects a worth of" in command.reason and "and drew" in command.reason
    assert sum("and drew" in c.reason for c in decision.considered) == 1
    assert len(decision.considered) == len(catalog.kernels) + len(state.sites) - 1
    fresh = HeuristicPolicy(chooser=Bandit(model, "bandit-1", seed=6))
    fresh.load_state_dict(json.loads(json.dumps(policy.state_dict())) | {
        "random": policy.state_dict()["random"]})
    later = replace(state, epoch=50)
    assert [c.site for c in fresh.decide(later, catalog).commands] == [
        c.site for c in policy.decide(later, catalog).commands]


def test_what_is_missing_is_the_mean_and_is_marked() -> None:
    rows = np.zeros((4, len(FEATURES)))
    depth, score = FEATURES.index("depth"), FEATURES.index("relative_score")
    rows[:, depth] = [0.0, 1.0, 0.5, np.nan]
    columns = fit_columns(rows)
    assert columns.lacking == ("depth",)
    x = columns(rows)
    mark = len(FEATURES)
    assert x[3, depth] == 0 and x[:, mark].tolist() == [0, 0, 0, 1]
    assert x[2, depth] == 0 and x[0, depth] < 0, "the mean, and not the smallest"
    never = np.zeros((1, len(FEATURES)))
    never[0, score] = np.nan
    assert np.isfinite(columns(never)).all(), "what was never missing may be so later"


def test_a_model_that_does_not_fit_together_is_refused(model: LinearModel) -> None:
    good = model.model_dump(mode="json")
    for change, said in (({"coefficients": [0.0]}, "as many coefficients"),
                         ({"noise": 0.0}, "noise"),
                         ({"columns": {**good["columns"], "used": ["magic"]}}, "magic")):
        with pytest.raises(ValidationError, match=said):
            LinearModel.model_validate({**good, **change})
