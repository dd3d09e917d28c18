"""Figures and page, from runs that are made up so that what comes out is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper.evaluation.experiment import ARMS
from esper.evaluation.summary import Subject, summarise
from esper.nissa.evaluation_page import headline, write_evaluation_page

SEEDS = (0, 1, 2, 3, 4, 5)


def _run(metric: float, flops: int = 1000, failure: str | None = None) -> dict[str, Any]:
    if failure is not None:
        return {"failure": failure}
    rows = [{"epoch": e, "step": 10 * e, "flops": flops * e // 4, "seconds": e / 2,
             "parameters": 50 + 10 * e, "loss": 1.0, "metric": metric * e / 4} for e in range(5)]
    return {"failure": None, "rows": rows, "peak_parameters": 95, "boundary_seconds": [0.1, 0.3],
            "flops": {"training": flops - 10, "statistics": 10}, "versions": {"torch": "2"},
            "hardware": {"cpu": "C", "isa": "I", "cores": 2, "threads": 1},
            "events": [{"what": "transition", "after": "TRAINING", "flops": 300, "epoch": 1,
                        "site": "a<b", "blueprint": "gated", "trigger": "due", "before": ""}]}


def _runs() -> dict[str, dict[int, dict[str, Any]]]:
    made = {arm: {s: _run(0.5 + 0.01 * s) for s in SEEDS} for arm in ARMS if arm != "gromo"}
    made["esper"] = {s: _run(0.6 + 0.011 * s) for s in SEEDS}
    made["host"][3] = _run(0, failure="Traceback\nit <diverged>")
    del made["longer"][5]
    return made


def _subject(**changes: Any) -> Subject:
    given = {"name": "n", "data": "digits", "metric": "accuracy", "higher_is_better": True,
             "budget": 1000, "seeds": SEEDS, "tuning": False, "target": None, "config": {"a": 1},
             "kernels": None, "not_run": {"gromo": "not installed"}}
    return Subject(**{**given, **changes})


def test_differences_are_paired_and_nothing_is_dropped_in_silence() -> None:
    figures = summarise(_subject(), _runs())
    arms = {a["arm"]: a for a in figures["arms"]}
    less = arms["fixed"]["esper_minus"]
    assert less["value"] == pytest.approx(0.1 + 0.001 * 2.5) and less["count"] == 6
    # The seeds' own differences cancel: the interval is that of what is left.
    assert 0.1 <= less["low"] <= less["value"] <= less["high"] <= 0.105
    assert (less["better"], less["ties"]) == (6, 0)
    assert arms["host"]["failures"] == {"3": "Traceback\nit <diverged>"}
    assert arms["host"]["runs"] == 5 and arms["host"]["esper_minus"]["count"] == 5
    assert arms["longer"]["missing"] == [5] and arms["gromo"]["not_run"] == "not installed"
    assert arms["esper"]["flops_by"] == {"statistics": 10.0, "training": 990.0}
    assert arms["esper"]["parameters"]["median"] == 90


def test_the_target_is_the_matched_big_models_end_and_not_reaching_it_counts() -> None:
    figures = summarise(_subject(), _runs())
    assert figures["target"] == {"value": pytest.approx(0.525), "whence":
                                 "the median end of big_matched"}
    arms = {a["arm"]: a["to_target"] for a in figures["arms"]}
    assert (arms["fixed"]["reached"], arms["fixed"]["of"]) == (3, 6)
    assert arms["fixed"]["median"]["value"] is None, "half of them never had it"
    assert (arms["esper"]["reached"], arms["esper"]["median"]["value"]) == (6, 1000.0)
    named = summarise(_subject(target=0.3), _runs())
    assert named["target"]["whence"] == "the configuration"
    assert {a["arm"]: a["to_target"] for a in named["arms"]}["fixed"]["reached"] == 6


def test_the_page_says_what_came_out_and_shows_every_arm(tmp_path: Path) -> None:
    runs = _runs()
    figures = summarise(_subject(), runs)
    assert headline(figures)[1] == "good" and "better than the fixed" in headline(figures)[0]
    lower = summarise(_subject(higher_is_better=False), runs)
    assert headline(lower)[1] == "bad" and lower["arms"][4]["esper_minus"]["better"] == 0
    page = write_evaluation_page(tmp_path / "p.html", figures, runs).read_text()
    assert "it &lt;diverged&gt;" in page and "<diverged>" not in page
    assert "1 not run yet" in page and "not run: not installed" in page
    assert "3 of 6" in page and "a&lt;b: gated begins" in page
    nothing = summarise(_subject(), {})
    assert headline(nothing)[1] == "open"
    write_evaluation_page(tmp_path / "q.html", nothing, {})
