"""Several processes train one model that grows: they stay one model, whatever one of them meets."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.checkpoint import checkpoints_in, read_checkpoint
from tests.kernels import Kernels
from tests.tolaria import scenarios
from tests.tolaria.teamwork import launch, results

pytestmark = pytest.mark.slow


def all_equal(said: list[Any], *keys: str) -> None:
    for key in keys:
        for rank, other in enumerate(said):
            assert other[key] == said[0][key], (key, rank)


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_over_a_whole_life_of_seeds_all_ranks_hold_the_same(
    kind: str, size: int, tmp_path: Path
) -> None:
    """Growth, training, fossilization, cull, and a NaN that one rank alone sees."""
    said = results(launch(scenarios.life, size, tmp_path, kind=kind))
    all_equal(said, "seen", "gains", "growth_steps", "moves", "run_id", "reports")
    assert [s["asked"] for s in said] == [9] + [0] * (size - 1), "rank 0 decides"
    assert [s["watches"] for s in said] == [True] + [False] * (size - 1)
    assert said[0]["losses"] != said[1]["losses"], "each has data of its own"
    states = {state for sites, _, _ in said[0]["seen"] for state in sites.values()}
    assert states >= {"GRAFTING", "STABILIZATION", "FINE_TUNING", "CULLED"}
    assert {m[2] for m in said[0]["moves"]} >= {"TRAINING", "FOSSILIZED", "CULLED", "ROLLED_BACK"}
    assert [rolled for _, _, rolled in said[0]["seen"]] == [False] * 7 + [True, False]
    scores = [score for _, _, sites in said[0]["gains"] for _, _, score in sites]
    assert any(score is not None for score in scores)
    assert all(math.isfinite(v) for vs in said[0]["parameters"].values() for v in vs)


@pytest.mark.parametrize(("kind", "options"), [
    ("ddp", {}), ("ddp", {"find_unused_parameters": True}), ("ddp", {"static_graph": True}),
    ("fsdp", {}), ("layers", {}),
], ids=["ddp", "ddp-unused", "ddp-static", "fsdp", "fsdp-layers"])
def test_gradients_are_those_of_the_whole_batch_in_one_process(
    kind: str, options: Any, tmp_path: Path
) -> None:
    compared = results(launch(scenarios.gradients, 2, tmp_path, kind=kind, **options))
    assert all(n == compared[0] and n >= 6 * 13 for n in compared)


@pytest.mark.parametrize("kind", ["ddp", "compiled", "fsdp"])
def test_gradients_through_compiled_kernels(kind: str, kernels: Kernels, tmp_path: Path) -> None:
    """Which every process fetches from the library, verifies and opens for itself."""
    made = kernels.kernel(SiteSignature(kind=SiteKind.FEATURES, channels=12))
    compared = results(launch(scenarios.gradients, 2, tmp_path, kind=kind, library=kernels.root,
                              kernel=(made.kernel_id, made.blueprint_id)))
    assert compared == [6 * 14] * 2


def test_a_kernel_joins_when_the_last_rank_has_it(tmp_path: Path) -> None:
    said = results(launch(scenarios.trouble, 2, tmp_path, what="late"))
    all_equal(said, "moves", "states")
    (joined,) = [m for m in said[0]["moves"] if m[2] == "TRAINING"]
    assert joined[0] == 11, "it was there before step 11 was over"


def test_so_does_one_that_was_on_its_way_when_the_run_was_saved(tmp_path: Path) -> None:
    said = results(launch(scenarios.in_flight, 2, tmp_path))
    assert said == [["GERMINATED", "GERMINATED", "TRAINING", "TRAINING"]] * 2


@pytest.mark.parametrize(("what", "after", "reason"), [
    ("load", "CULLED", "rank 1: the digest does not match"),
    ("kernel", "CULLED", "rank 1: .*it broke here"),
    ("guard", "CULLED", "drift 50"),
    ("holdout", "ROLLED_BACK", "held-out loss nan"),
])
def test_what_one_rank_meets_all_of_them_answer_alike(
    what: str, after: str, reason: str, tmp_path: Path
) -> None:
    said = results(launch(scenarios.trouble, 2, tmp_path, what=what))
    all_equal(said, "moves", "states", "sites", "quarantined")
    moves = [m for m in said[0]["moves"] if m[2] == after]
    assert len(moves) == 1
    assert re.search(reason, moves[0][3])
    assert bool(said[0]["quarantined"]) is (what in ("load", "kernel"))


def test_a_step_that_one_ranks_seed_spoils_is_left_out_by_all_scalers(tmp_path: Path) -> None:
    first, second = results(launch(scenarios.scaled, 2, tmp_path))
    assert first == second
    assert [finite for finite, *_ in first].count(False) == 1
    assert (first[-1][1], first[-1][2]) == (8.0, len(first) - 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_run_and_it_resumes(kind: str, tmp_path: Path) -> None:
    """Bit for bit with as many ranks, and from the same state with any other number."""
    plain = results(launch(scenarios.interrupted, 2, tmp_path / "plain", kind=kind))
    folder = tmp_path / "killed"
    killed = launch(scenarios.interrupted, 2, folder, kind=kind, kill_at=22)
    assert killed[1].code == -9 and killed[0].code == 1
    assert re.search("RankError|remote worker|Connection closed", killed[0].error)  # or torch's own
    kept = checkpoints_in(folder / "kept")
    assert kept[-1].name.endswith("-step-20")
    said = results(launch(scenarios.interrupted, 2, folder, kind=kind, resume=True))
    for mine, whole in zip(said, plain, strict=True):
        assert mine["begun"]["step"] == 20 and mine["losses"] == whole["losses"][20:]
        assert mine["state"] == whole["state"] and mine["holdout"] == whole["holdout"]
    all_equal(said, "state", "sites")
    other: Any = None
    for size, as_kind in ((1, kind), (4, kind), (2, "fsdp" if kind == "ddp" else "ddp")):
        place = tmp_path / f"{size}-{as_kind}"
        place.mkdir()
        (place / "kept").symlink_to(_only(folder, "-step-20", place / "held"))
        said = results(launch(scenarios.interrupted, size, place, kind=as_kind, resume=True,
                              epochs=5))
        all_equal(said, "state", "sites", "holdout")
        begun = said[0]["begun"]
        assert (begun["step"], begun["batch"]) == (20, 2 * 2 // size)
        other = other or begun["state"]
        assert begun["state"] == other, "whoever resumes begins with the same model"
    assert read_checkpoint(kept[-1]).manifest.step == 20


def _only(folder: Path, ending: str, into: Path) -> Path:
    """A folder with that checkpoint alone."""
    into.mkdir()
    for path in checkpoints_in(folder / "kept"):
        if path.name.endswith(ending):
            shutil.copytree(path, into / path.name)
            break
    return into


def test_what_several_processes_cannot_do_says_so(tmp_path: Path) -> None:
    said = results(launch(scenarios.refused, 2, tmp_path))
    for one in said:
        assert "been through DistributedDataParallel already; wrap it first" in one["ddp first"]
        assert "been through fully_shard already; wrap it first" in one["fsdp first"]
        assert "2 processes train, and the session was given a Sequential" in one["plain"]
        assert "number of held-out batches: 2 on rank 1, 1 on rank 0" in one["holdout"]
        assert "make it after fully_shard" in one["optimizer"]
        assert "begin with a fresh one" in one["grown"]
        assert "has grown otherwise than the others" in one["otherwise"]
