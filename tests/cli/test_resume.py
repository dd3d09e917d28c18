"""`esper train --resume`: killed in the middle, the run ends as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.cli.main import main
from esper.leyline.library import KernelRecord
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.nissa.metrics import read_run
from esper.urza.library import LocalLibrary
from tests.cli.test_commands import esper_command

ROOT = Path(esper.__file__).parents[1]
HOST = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1),
                         nn.Linear(32, 10))
"""
CONFIG = """
name: {name}
seed: 3
threads: 1
compare: false
model: {{factory: "host.py:make"}}
data: {{name: digits, batch_size: 32, limit: 256, eval_limit: 100}}
train: {{epochs: {epochs}, optimizer: {{name: adamw, lr: 3.0e-3}}}}
growth:
  sites: ["2"]
  reproducible: true
  warm_up: 10
  policy: {{start: 2, every: 6, training_epochs: 2, stabilization_epochs: 2, fine_tuning_epochs: 1}}
  alpha: {{steps: 20}}
library: {{path: library}}
slow_track: {{enabled: false}}
checkpoint: {{every_steps: 5, every_epochs: 1, keep: 2}}
"""


def configure(folder: Path, name: str, epochs: int = 60) -> Path:
    (folder / "host.py").write_text(HOST)
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(name=name, epochs=epochs))
    return path


def killed_at(folder: Path, arguments: list[str], epochs: Path, count: int) -> None:
    """Run `esper train` and kill it once `count` epochs are written."""
    child = subprocess.Popen(
        [sys.executable, "-m", "esper.cli.main", "train", *arguments], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if epochs.exists() and epochs.read_bytes().count(b"\n") >= count:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -9, errors.decode()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Epochs, less what a clock says."""
    return [r.model_dump(exclude={"seconds", "depths"}) for r in read_run(folder).epochs]


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one_with_real_kernels(
    tmp_path: Path, feature_artifact: Path
) -> None:
    _library(tmp_path / "library", feature_artifact)
    configure(tmp_path, "plain")
    configure(tmp_path, "killed")
    assert esper_command("train", "plain.yaml", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs/killed"
    killed_at(tmp_path, ["killed.yaml"], run / "epochs.jsonl", 4)
    for count in (14, 31):
        killed_at(tmp_path, ["killed.yaml", "--resume", str(run)], run / "epochs.jsonl", count)
    done = esper_command("train", "killed.yaml", "--resume", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stdout
    assert rows(run) == rows(tmp_path / "runs/plain") and len(rows(run)) == 60
    a, b = read_run(tmp_path / "runs/plain"), read_run(run)
    assert not b.notes and b.summary is not None and a.summary is not None
    assert b.steps is not None and a.steps is not None and len(a.steps) == len(b.steps)
    assert (a.growth_steps == b.growth_steps).all()  # type: ignore[union-attr]
    states = [[(r.payload.after, r.payload.step) for r in run.audit if r.kind == "transition"]
              for run in (a, b)]
    assert states[0] == states[1]
    assert {"TRAINING", "GRAFTING", "STABILIZATION"} <= {s for s, _ in states[0]}
    assert (run / "undone.jsonl").exists()
    assert len(list((run / "checkpoints").iterdir())) == 2


def _library(folder: Path, artifact: Path) -> KernelRecord:
    from esper.kasmina.artifact import open_artifact
    from esper.leyline.base import sha256

    opened = open_artifact(artifact, sha256(artifact.read_bytes()))
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=32)
    library = LocalLibrary(folder)
    library.submit(opened.ir, signature, author="test")
    claim = library.claim_blueprint("test", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact.read_bytes())
    work = library.claim_kernel("test", 60)
    assert work is not None
    record = library.complete_kernel(work, ValidationReport(
        kernel_id=work.record.kernel_id, accepted=True, seconds=0.0))
    library.close()
    return record


def test_what_cannot_be_resumed_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(*arguments: str) -> tuple[int, str]:
        threads = torch.get_num_threads()
        try:
            code = main(["train", "run.yaml", *arguments])
        finally:
            torch.set_num_threads(threads)
        return code, capsys.readouterr().err

    configure(tmp_path, "run", epochs=2)
    assert train() == (0, "")
    config = configure(tmp_path, "run", epochs=3)
    run = Path("runs/run")
    assert train("--resume", "runs/run") == (0, "")
    assert [r["epoch"] for r in rows(run)] == [1, 2, 3], "a longer run may go on from its end"
    text = config.read_text()
    config.write_text(text.replace("seed: 3", "seed: 4").replace("{steps: 20}", "{steps: 21}"))
    code, said = train("--resume", "runs/run")
    assert code == 2
    assert "seed was 3 and is 4, growth.alpha.steps was 20 and is 21; give the file" in said
    config.write_text(text)
    kept = sorted((run / "checkpoints").iterdir())
    (kept[-1] / "tensors.safetensors").write_bytes(b"torn")
    code, said = train("--resume", "runs/run")
    assert code == 2 and "it is torn" in said and str(kept[-2]) in said
    assert train("--resume", str(kept[-2]))[0] == 0
    code, said = train("--resume", "runs/none")
    assert code == 2 and "not a run folder" in said
    shutil.rmtree(run / "checkpoints")
    code, said = train("--resume", "runs/run")
    assert code == 2 and "has no checkpoint to resume from" in said
