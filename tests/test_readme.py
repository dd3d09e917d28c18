"""Every command of the README runs, and its Python does what it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.cli.main import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.strip()]


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in commands() if c.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_commands_are_understood() -> None:
    """Within seconds, what the slow test below takes minutes to find."""
    for command in commands():
        if command.startswith("esper "):
            parser().parse_args(shlex.split(command)[1:])


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_commands_run_and_the_demo_grows(tmp_path: Path) -> None:
    """The demo itself, as `make demo` runs it, then the commands that look at what it left."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    ours = [c for c in commands() if c.startswith("esper ")]
    assert ours[:2] == ["esper doctor", "esper train examples/digits.yaml"]
    for command in ours:
        done = subprocess.run(
            [sys.executable, "-m", "esper.cli.main", *shlex.split(command)[1:]], cwd=tmp_path,
            capture_output=True, text=True, timeout=900,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}{done.stdout[-1000:]}"
    assert (tmp_path / "runs/digits/report.html").stat().st_size > 10_000
    records = [json.loads(line) for line in
               (tmp_path / "runs/digits/audit.jsonl").read_text().splitlines()]
    states = [r["payload"]["after"] for r in records if "after" in r.get("payload", {})]
    log = (tmp_path / "runs/digits/slowtrack.log").read_text()
    assert "FOSSILIZED" in states, f"{states}\n{log[-3000:]}"
    book = json.loads((tmp_path / "runs/digits/kernels.json").read_text())
    refused = [b for b in book["blueprints"] if b["status"] == "INVALID"]
    rejected = [k for k in book["kernels"] if k["status"] == "REJECTED"]
    assert "CULLED" in states or refused or rejected, "no candidate was turned away"
    summary = json.loads((tmp_path / "runs/digits/summary.json").read_text())
    assert summary["control"]["epochs"], "the same host was trained without growth"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class MyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("layer1", "layer2"):
                setattr(self, name, nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer2(self.layer1(x)))

    batches = [(torch.randn(8, 16), torch.randint(0, 3, (8,))) for _ in range(4)]
    names = {"MyModel": MyModel, "example": batches[0][0], "holdout_batches": batches[:1],
             "loader": batches[1:]}
    (source,) = blocks("python")
    exec(source, names)
    plain, model = names["plain"], names["model"]
    torch.testing.assert_close(plain(batches[0][0]), model(batches[0][0]))  # type: ignore[operator]
    assert (tmp_path / "exported/grown.py").exists()
