"""The arms in plain torch: what they spend, where they end, and that they share what they should.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.data.losses import evaluate
from esper.errors import ContractError, EsperError
from esper.evaluation.arms import _Run, train
from esper.evaluation.kernels import copy_library
from esper.urza.library import LocalLibrary
from tests.evaluation.support import experiment
from tests.kernels import Kernels


def test_nominal_arms_end_after_their_epochs_and_the_others_with_the_budget() -> None:
    made = experiment()
    runs = {arm: train(made, arm, 3) for arm in ("host", "longer", "big", "big_matched", "fixed")}
    budget = made.budget("longer")
    assert runs["host"]["budget"] < budget < runs["big"]["budget"]
    for arm, run in runs.items():
        last, steps = run["rows"][-1], [r["step"] for r in run["rows"]]
        assert steps == sorted(set(steps)) and run["rows"][0]["step"] == 0
        assert sum(run["flops"].values()) == last["flops"]
        if arm in ("host", "big"):
            assert last["step"] == 6 * 7 and last["flops"] == run["budget"]
        else:
            assert run["budget"] == budget
            one_step = last["flops"] / last["step"]
            assert budget <= last["flops"] < budget + 2 * one_step
    # The budget is what the fixed grower spends in its nominal time.
    assert runs["fixed"]["rows"][-1]["step"] == 6 * 7
    assert runs["fixed"]["rows"][-1]["flops"] == budget
    assert [e["epoch"] for e in runs["fixed"]["events"]] == [2, 4]
    assert runs["longer"]["rows"][-1]["step"] > 6 * 7 > runs["big_matched"]["rows"][-1]["step"]
    sizes = {arm: run["rows"][-1]["parameters"] for arm, run in runs.items()}
    assert sizes["host"] == sizes["longer"] < sizes["big"] == sizes["fixed"]
    # The same weights and the same data: until the budget shows in the learning rate, one run.
    assert runs["host"]["rows"][0]["loss"] == runs["fixed"]["rows"][0]["loss"]


def test_a_run_is_the_same_every_time_and_its_rate_ends_at_nothing() -> None:
    made = experiment()
    keys = ("step", "flops", "loss", "metric")
    one, two = ([{k: r[k] for k in keys} for r in train(made, "fixed", 1)["rows"]]
                for _ in range(2))
    assert one == two
    run = _Run(made, made.fresh_host(1), made.budget("longer"), 1)
    run.go()
    assert run.optimizer.param_groups[0]["lr"] < 1e-9


def test_looking_at_the_eval_samples_costs_nothing_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    made = experiment()
    run = _Run(made, made.fresh_host(1), made.budget("longer"), 1)
    now = [10.0]
    monkeypatch.setattr("esper.evaluation.meter.time.perf_counter", lambda: now[0])
    run.meter.start()
    now[0] += 3
    state, spent = torch.get_rng_state(), run.meter.spent

    def slow(*given: Any) -> tuple[float, float]:
        now[0] += 5
        return evaluate(*given)

    monkeypatch.setattr("esper.evaluation.arms.evaluate", slow)
    run._note()
    assert run.meter.spent == spent and torch.equal(torch.get_rng_state(), state)
    now[0] += 1
    assert run.meter.seconds == 4.0


def test_a_run_that_diverges_fails_and_says_so() -> None:
    made = experiment(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e30))
    with pytest.raises(EsperError, match="diverged: the loss is"):
        train(made, "host", 0)
    with pytest.raises(ContractError, match="library"):
        train(made, "esper", 0)


@pytest.mark.slow
def test_grown_arms_count_seeds_statistics_and_what_was_thrown_away(
    kernels: Kernels, tmp_path: Path
) -> None:
    made = experiment()
    kernels.kernel(made.signatures["act"])
    runs = {}
    for arm in ("esper", "random"):
        for again in range(2):
            library = copy_library(kernels.root, tmp_path / f"{arm}-{again}")
            assert LocalLibrary(library).reports() == []
            runs[arm, again] = train(made, arm, 5, library)
    for arm in ("esper", "random"):
        one, two = runs[arm, 0], runs[arm, 1]
        same = [[{k: r[k] for k in ("step", "flops", "loss")} for r in x["rows"]]
                for x in (one, two)]
        assert same[0] == same[1], "reproducible, whatever the machine does meanwhile"
        born = [e for e in one["events"] if e.get("after") == "TRAINING"]
        assert born and born[0]["blueprint"] == "bottleneck"
        assert one["flops"]["warm-up"] > 0 and one["flops"]["training"] > 0
        assert one["budget"] <= one["rows"][-1]["flops"]
        assert one["peak_parameters"] > made.fresh_host(0).first.weight.numel()
        assert one["flops"]["statistics"] > 0
    assert kernels.library.reports() == [], "what a run learns stays in its own library"
