"""`esper evaluate`: interrupted and taken up again, its page, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from esper.cli.evaluate_config import experiment_of, load
from esper.cli.main import main
from esper.errors import ConfigError, DataMissing
from esper.evaluation import gromo, kernels
from esper.evaluation.experiment import ARMS

ROOT = Path(__file__).parents[2]
CONFIG = """
name: small
model: {factory: "hosts.py:Host"}
block: {factory: "hosts.py:Block"}
data: {name: digits, batch_size: 32, limit: 200, eval_limit: 100}
train: {epochs: 6, optimizer: {lr: 1.0e-2}}
fixed: {blocks: 2, first: 2, every: 2}
growth:
  sites: [act]
  policy: {start: 1, every: 1, training_epochs: 1}
  alpha: {steps: 4}
  embargo_epochs: 1
kernels: {mutants: 0}
seeds: [0, 1]
tuning_seeds: [7]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "hosts.py").write_text(
        (ROOT / "tests/evaluation/support.py").read_text().partition("def experiment")[0])
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def _changed(config: Path, before: str, after: str) -> Path:
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    return config


@pytest.mark.parametrize("path", sorted((ROOT / "examples/evaluate").glob("*.yaml")),
                         ids=lambda p: p.stem)
def test_examples_can_be_evaluated(path: Path) -> None:
    config = load(path)
    try:
        experiment = experiment_of(config, path)
    except DataMissing as e:
        pytest.skip(str(e))
    assert len(config.seeds) >= 10
    assert experiment.budget("host") < experiment.budget("longer") < experiment.budget("big")


def test_a_seed_that_is_tuned_on_is_not_reported(config: Path) -> None:
    with pytest.raises(ConfigError, match="share 1; what was tuned on a seed"):
        load(_changed(config, "tuning_seeds: [7]", "tuning_seeds: [7, 1]"))


@pytest.mark.parametrize(("before", "after", "why"), [
    ("seeds: [0, 1]", "seeds: [0, 0]", "each once"),
    ("blocks: 2", "blocks: 5", "its last block would come after epoch 10 of 6"),
    ("sites: [act]", "sites: auto", "name the sites"),
    ("embargo_epochs: 1", "reproducible: true", "not for evaluate"),
    ("hosts.py:Block", "hosts.py:Blok", r"block\.factory.*did you mean 'Block'"),
])
def test_what_cannot_be_compared_is_refused(
    config: Path, before: str, after: str, why: str
) -> None:
    path = _changed(config, before, after)
    with pytest.raises(ConfigError, match=why):
        experiment_of(load(path), path).budget("big")


def test_arms_are_left_out_only_while_tuning(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(config), "--arms", "fixed"]) == 2
    assert "what is reported has all arms" in capsys.readouterr().err
    assert main(["evaluate", str(config), "--tuning", "--arms", "fixt"]) == 2
    assert "there is no fixt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_evaluation_leaves_nobody_behind_and_goes_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _changed(config, "tuning_seeds: [7]", "tuning_seeds: [7, 8]")
    words = ["evaluate", str(config), "--tuning", "--arms", "host,fixed", "--jobs", "1",
             "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "esper.cli.main", *words], cwd=ROOT)
    runs = tmp_path / "out/small-tuning/runs"
    deadline = time.monotonic() + 240
    children: list[psutil.Process] = []
    while not (list(runs.glob("*.json")) and children):
        assert time.monotonic() < deadline and process.poll() is None
        children = psutil.Process(process.pid).children()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left
    before = {p.name: p.read_bytes() for p in runs.glob("*.json")}
    assert 1 <= len(before) < 4, "it was killed amid its work"

    assert main(words) == 0
    after = {p.name: p.read_bytes() for p in runs.glob("*.json")}
    assert len(after) == 4 and {k: after[k] for k in before} == before
    out = capsys.readouterr().out
    assert f"{4 - len(before)}/{4 - len(before)}" in out

    figures = json.loads((runs.parent / "results.json").read_text())
    assert figures["tuning"] and [a["runs"] for a in figures["arms"] if not a["not_run"]] == [2, 2]
    assert "for tuning: not to be reported" in (runs.parent / "report.html").read_text()

    # A failed run is shown, and run again; another configuration is refused by name.
    failed = json.loads((runs / "host-8.json").read_text())
    (runs / "host-8.json").write_text(json.dumps({**failed, "failure": "it broke"}))
    # Esper's business, and no control's.
    _changed(config, "start: 1", "start: 2")
    _changed(config, "limit: 200,", "limit: 200, holdout_limit: 40,")
    assert main(words) == 0
    assert json.loads((runs / "host-8.json").read_text())["rows"][-1]["metric"] == \
        failed["rows"][-1]["metric"]
    _changed(config, "first: 2", "first: 1")
    assert main(words) == 2
    assert "fixed.first was 2 and is 1" in capsys.readouterr().err


@pytest.mark.slow
def test_all_arms_run_and_are_shown(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    _changed(config, "seeds: [0, 1]", "seeds: [1]")
    every = kernels.templates_for
    monkeypatch.setattr(kernels, "templates_for", lambda signature: every(signature)[:1])
    assert main(["evaluate", str(config), "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out/small"
    figures = json.loads((folder / "results.json").read_text())
    by_arm = {a["arm"]: a for a in figures["arms"]}
    assert list(by_arm) == list(ARMS)
    without = {"gromo"} if gromo.why_not() else set()
    for arm in without:
        assert by_arm[arm]["not_run"] == gromo.why_not(), "what did not run says why"
    for arm in set(ARMS) - without:
        assert by_arm[arm]["runs"] == 1 and not by_arm[arm]["failures"], by_arm[arm]
        assert 0 <= by_arm[arm]["final"]["mean"]["value"] <= 1
    assert by_arm["fixed"]["esper_minus"]["count"] == 1
    assert figures["kernels"]["validated"] == 1 and figures["kernels"]["compile_seconds"] > 0
    assert not list((folder / "work").iterdir()), "copies of the library are cleared away"
    assert figures["target"]["whence"] == "the median end of big_matched"
    page = (folder / "report.html").read_text()
    for arm in ARMS:
        assert arm in page
    assert gromo.why_not() in page and "What grew when" in page
    table = subprocess.run(
        [sys.executable, str(ROOT / "scripts/evidence"), str(folder / "results.json")],
        capture_output=True, text=True, check=True).stdout
    assert f"{by_arm['esper']['final']['mean']['value']:.4f}" in table
    capsys.readouterr()
    assert main(["evaluate", str(config), "--out", str(tmp_path / "out")]) == 0
    assert " seed " not in capsys.readouterr().out, "nothing is run twice"
