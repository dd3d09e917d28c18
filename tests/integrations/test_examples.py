"""The examples of training loops run as they stand, with fewer epochs, and grow."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
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
    "loop_ddp": [],
    "loop_accelerate": ["accelerate"],
    "loop_lightning": ["pytorch_lightning"],
    "loop_transformers": ["transformers", "accelerate"],
}


def test_they_are_short() -> None:
    found = {p.stem: len(p.read_text().splitlines()) for p in EXAMPLES.glob("loop_*.py")}
    assert found.keys() == NEEDS.keys() and max(found.values()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NEEDS if n != "loop_ddp"])
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


@pytest.mark.slow
def test_it_grows_in_several_processes(kernels: Kernels, tmp_path: Path) -> None:
    """By torchrun, as it says of itself."""
    kernels.kernel(SiteSignature(kind=SiteKind.MAP, channels=16))
    (tmp_path / "library").symlink_to(kernels.root)
    shorter = (EXAMPLES / "loop_ddp.py").read_text().replace("401", "9")
    (tmp_path / "loop.py").write_text(f"""
import contextlib, sys
import esper, esper.tolaria.session
from esper.tamiyo.care import Care
from esper.tamiyo.triggers import Schedule
esper.SlowTrack = lambda folder: contextlib.nullcontext()
policy = esper.HeuristicPolicy
esper.tolaria.session.HeuristicPolicy = lambda: policy(Schedule(1), care=Care(min_gain=-1e6))
{shorter}
grouped = [p for g in optimizer.param_groups for p in g["params"]]
assert {{id(p) for p in grouped}} == {{id(p) for p in model.parameters()}}
print(rank, "ended", [hash(tuple(p.flatten().tolist())) for p in grouped], flush=True)
""")
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--redirects", "1", "--log-dir", str(tmp_path / "logs"), str(tmp_path / "loop.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    zero, one = (p.read_text().lower() for p in sorted((tmp_path / "logs").rglob("stdout.log")))
    assert [line[2:] for line in zero.splitlines()] == [line[2:] for line in one.splitlines()]
    assert all(word in zero for word in ("germinate", "advance", "fossilize", "ended"))
