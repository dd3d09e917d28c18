"""`esper simic` and `esper library families`, as a stranger uses them on a library of reports."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from esper.cli.bandit import bandit_of
from esper.cli.main import main
from esper.errors import LibraryError
from esper.leyline.command import FieldReport
from esper.urza.library import LocalLibrary
from tests.simic.world import World


def keep(folder: Path, reports: Sequence[FieldReport], *, old: bool = False) -> None:
    """In one transaction; `old`: as they were written before there were contexts."""
    LocalLibrary(folder).close()
    with sqlite3.connect(folder / "library.db") as con:
        for r in reports:
            said = json.loads(r.model_dump_json())
            if old:
                del said["context"]
            con.execute("INSERT INTO reports (report_id, time, report) VALUES (?, ?, ?)",
                        (r.report_id, r.time, json.dumps(said)))
    con.close()


def test_simic_from_no_report_to_a_promoted_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--library", str(tmp_path)]
    assert main(["simic", "train", *where]) == 2
    assert "there is no library in" in capsys.readouterr().err
    world = World(effect=3, seed=1)
    keep(tmp_path, world.runs(4), old=True)
    assert main(["simic", "train", *where]) == 0
    said = capsys.readouterr().out
    assert "too few reports" in said and "nothing was trained, nothing promoted" in said
    library = LocalLibrary(tmp_path)
    assert all(r.context is None for r in library.reports())
    nobody, why = bandit_of(library, seed=0)
    assert nobody is None and "no version is promoted" in why and "the heuristic chooses" in why
    keep(tmp_path, world.runs(90))
    assert main(["simic", "train", *where]) == 0
    assert "bandit-1: promoted: saves" in capsys.readouterr().out
    assert main(["simic", "status", *where]) == 0
    said = capsys.readouterr().out
    assert "held out" in said and "bandit-1" in said and "in use" in said
    bandit, why = bandit_of(library, seed=0)
    assert bandit is not None and bandit.version == "bandit-1" and "bandit-1 chooses" in why
    resumed, _ = bandit_of(library, seed=0, before="heuristic")
    assert resumed is None, "a run goes on with what it began with"
    with pytest.raises(LibraryError, match=r"bandit-9\.json: No such file"):
        bandit_of(library, seed=0, before="bandit-9")


def test_families_of_a_library_that_has_none_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LocalLibrary(tmp_path)
    assert main(["library", "families", "--library", str(tmp_path)]) == 0
    assert "no signature matches" in capsys.readouterr().out
