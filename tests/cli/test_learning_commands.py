"""`esper simic` and `esper library families`, as a stranger uses them on a library of reports."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper.cli import train
from esper.cli.bandit import bandit_of
from esper.cli.config import GrowthConfig, parse_config
from esper.cli.main import main, parser
from esper.errors import LibraryError
from esper.leyline.command import FieldReport
from esper.nissa.metrics import read_info
from esper.simic import promote as simic
from esper.simic.experience import experience_of
from esper.simic.versions import Versions
from esper.urza.library import LocalLibrary
from tests.simic.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"


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


def test_a_run_says_who_chooses_and_goes_on_with_the_version_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go(out: str, epochs: int, resume: bool = False) -> tuple[str, str]:
        config = parse_config(f"""
name: short
model: {{factory: "hosts.py:DigitsCNN", arguments: {{width: 4, blocks: 1}}}}
data: {{name: digits, limit: 64, eval_limit: 64}}
train: {{epochs: {epochs}}}
growth: {{sites: ["blocks.0"], policy: {{kind: bandit}}}}
library: {{path: "{tmp_path}/library"}}
slow_track: {{enabled: false}}
compare: false
out: "{tmp_path}/{out}"
""")
        folder = tmp_path / out
        assert train.run(config, EXAMPLES / "here.yaml", folder if resume else None) == 0
        return capsys.readouterr().out, read_info(folder).versions["policy"]

    said, policy = go("first", 1)
    assert policy == "heuristic" and "no version is promoted" in said
    versions = Versions(tmp_path / "library")
    experience = experience_of(World(effect=3, seed=1).runs(90))
    assert simic.train(experience, versions).version is not None
    said, policy = go("second", 1)
    assert policy == "bandit-1" and "bandit-1 chooses, trained on" in said
    one = versions.read(1)
    versions.add(one.model_copy(update={"number": 2}))
    said, policy = go("second", 2, resume=True)
    assert policy == "bandit-1" and "bandit-1 chooses" in said and "goes on after" in said
    said, policy = go("first", 2, resume=True)
    assert policy == "heuristic" and "as it did before" in said


def test_families_of_a_library_that_has_none_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LocalLibrary(tmp_path)
    assert main(["library", "families", "--library", str(tmp_path)]) == 0
    assert "no signature matches" in capsys.readouterr().out


def test_the_guides_commands_and_script_are_what_there_is(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs/learning.md").read_text()
    commands = re.findall(r"^esper (.+?)(?:   .*)?$", guide, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        parser().parse_args(shlex.split(line.replace("[", "").replace("]", "")))
    (yaml_text,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert GrowthConfig.model_validate(yaml.safe_load(yaml_text)["growth"]).policy.kind == "bandit"
    assert simic.train(experience_of(World(effect=3, seed=1).runs(90)), Versions(tmp_path))
    (script,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    made: dict[str, Any] = {}
    exec(script.replace('"library"', repr(str(tmp_path))), made)
    assert made["policy"].version == "bandit-1"
