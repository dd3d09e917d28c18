"""The examples of training loops run as they stand, with fewer epochs, and grow."""

from __future__ import annotations

import re
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.care import Care
from esper.tamiyo.triggers import Schedule
from tests.kernels import Kernels

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "loop_bare": [],
    "loop_accelerate": ["accelerate"],
    "loop_lightning": ["pytorch_lightning"],
    "loop_transformers": ["transformers", "accelerate"],
}


def test_they_are_short() -> None:
    found = {p.stem: len(p.read_text().splitlines()) for p in EXAMPLES.glob("loop_*.py")}
    assert found.keys() == NEEDS.keys() and max(found.values()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_it_grows(
    name: str, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    """With kernels that are there already, where the example has them made beside it, and a
    policy that minds no gain: this is about the way."""
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    for signature in (SiteSignature(kind=SiteKind.MAP, channels=16),
                      SiteSignature(kind=SiteKind.TOKENS, channels=32, causal=True)):
        kernels.kernel(signature)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "library").symlink_to(kernels.root)
    monkeypatch.setattr(esper, "SlowTrack", lambda folder: nullcontext())
    monkeypatch.setattr("esper.tolaria.session.HeuristicPolicy",
                        lambda: esper.HeuristicPolicy(Schedule(start=1), care=Care(min_gain=-1e6)))
    shorter = tmp_path / f"{name}.py"
    shorter.write_text(re.sub(r"\b400\b", "8", re.sub(
        r"\b401\b", "9", (EXAMPLES / f"{name}.py").read_text())))
    names: dict[str, Any] = runpy.run_path(str(shorter))
    session = names["session"] if "session" in names else names["growth"].session
    assert session.growth.epoch == 8 and session.growth_steps
    told = capsys.readouterr().out.lower()
    assert "germinate" in told and "advance" in told
    grown = [p for s in session.growth.fossils() + session.growth.active() for p in s.params]
    grouped = [id(p) for g in session.optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) and {id(p) for p in grown} <= set(grouped)
