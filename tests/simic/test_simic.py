"""Simic: what is promoted is better, what is not better is not promoted, and versions stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esper.errors import LibraryError
from esper.leyline.command import FieldReport
from esper.simic.experience import experience_of, held_out
from esper.simic.judge import compare
from esper.simic.promote import HEURISTIC, judge, train
from esper.simic.train import fit
from esper.simic.versions import Versions
from esper.tamiyo.features import FEATURES, PLAIN
from tests.simic.world import World, false_promotions


@pytest.fixture(scope="module")
def reports() -> list[FieldReport]:
    """Of ninety runs in which anything was tried."""
    return World(effect=3, seed=1).runs(90)


def test_a_version_that_knows_the_better_families_is_promoted_and_kept(
    tmp_path: Path, reports: list[FieldReport]
) -> None:
    versions = Versions(tmp_path)
    first = train(experience_of(reports), versions)
    assert first.version is not None and first.version.promoted
    verdict = first.version.verdict
    assert verdict.rival == HEURISTIC and verdict.low > 0
    assert verdict.new.error < verdict.old.error
    assert "promoted: saves" in first.said and "held-out runs" in first.said
    again = train(experience_of(reports), versions)
    assert again.version is None and "no report has come since bandit-1" in again.said
    promoted = versions.promoted()
    assert promoted == first.version and promoted.name == "bandit-1"
    second = train(experience_of([*reports, *World(seed=2).runs(3)]), versions)
    assert second.version is not None and second.version.verdict.rival == "bandit-1"
    assert [v.number for v in versions.all()] == [1, 2], "what is not promoted is kept too"


def test_shuffled_rewards_are_not_promoted_over_the_heuristic_nor_over_a_version(
    reports: list[FieldReport]
) -> None:
    experience = experience_of(reports)
    learning, held = experience.part(held=False), experience.part(held=True)
    good = judge(1, learning, held, None)
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(learning))
        shuffled = replace(learning, worth=learning.worth[order])
        assert not judge(2, shuffled, held, good).promoted
        assert not compare(fit(shuffled), fit(learning, PLAIN), held, HEURISTIC).wins


def test_what_is_no_better_is_promoted_at_most_once_in_twenty() -> None:
    """Of 60, more than 7 would be one chance in a hundred at a rate of one in twenty."""
    first, second = false_promotions(60)
    assert first <= 7 and second <= 7


def test_too_few_reports_are_said_to_be_too_few(
    tmp_path: Path, reports: list[FieldReport]
) -> None:
    outcome = train(experience_of(reports[:60]), Versions(tmp_path))
    assert outcome.version is None and outcome.said.startswith("too few reports: ")
    assert "of 60 reports to train on" in outcome.said
    assert "runs of two seeds to judge by" in outcome.said
    assert not Versions(tmp_path).all()


def test_a_run_is_held_out_whole_or_not_at_all_and_so_for_ever(
    reports: list[FieldReport]
) -> None:
    experience = experience_of(reports)
    learning, held = experience.part(held=False), experience.part(held=True)
    assert set(learning.runs).isdisjoint(held.runs)
    assert len(learning) + len(held) == len(experience) == len(reports)
    assert [i for i in range(10) if held_out(f"run-{i}")] == [1, 4, 5, 7, 8, 9]


def test_reports_without_a_context_are_used_for_what_they_have(
    reports: list[FieldReport]
) -> None:
    world = World()
    by_id = {k.kernel_id: k for _, k in world.kernels}
    old = [r.model_copy(update={"context": None}) for r in reports]
    experience = experience_of(old, by_id)
    known = ~np.isnan(experience.rows)
    of_report = dict(zip(FEATURES, known.all(axis=0), strict=True))
    assert of_report["map"] and of_report["log_channels"] and of_report["log_parameters"]
    of_nobody = dict(zip(FEATURES, ~known.any(axis=0), strict=True))
    assert of_nobody["depth"] and of_nobody["log_epoch"] and of_nobody["earned"], "not zero"
    assert not (~np.isnan(experience_of(old).rows)).any(), "nor does the library have the kernel"
    mixed = experience_of([*old[:180], *reports[180:]], by_id)
    version = judge(1, mixed.part(held=False), mixed.part(held=True), None)
    assert np.isfinite(version.model.predict(mixed.rows)).all()


def test_a_version_that_was_tampered_with_is_refused(
    tmp_path: Path, reports: list[FieldReport]
) -> None:
    versions = Versions(tmp_path)
    version = train(experience_of(reports), versions).version
    assert version is not None
    path = tmp_path / "policies" / "bandit-1.json"
    with pytest.raises(LibraryError, match="there already"):
        versions.add(version)
    held = json.loads(path.read_text())
    held["version"]["promoted"] = not held["version"]["promoted"]
    path.write_text(json.dumps(held))
    with pytest.raises(LibraryError, match="its digest is another"):
        versions.promoted()
    path.write_text("{")
    with pytest.raises(LibraryError, match="no version of a policy"):
        versions.promoted()
    assert sorted(p.name for p in path.parent.iterdir()) == ["bandit-1.json"]
