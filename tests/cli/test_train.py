"""A whole run in this process: what it says of a slow track that is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from esper.cli import train
from esper.cli.config import parse_config
from esper.leyline.events import Event, Topic
from esper.nissa.findings import trail
from esper.nissa.metrics import read_run
from esper.slowtrack import SlowTrack

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_slow_track_that_died_is_told_once_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Doomed(SlowTrack):
        def start(self) -> SlowTrack:
            super().start()
            assert self.pid is not None and self._process is not None
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()
            return self

    monkeypatch.setattr(train, "SlowTrack", Doomed)
    config = parse_config(f"""
name: doomed
model: {{factory: "hosts.py:DigitsCNN", arguments: {{width: 4, blocks: 1}}}}
data: {{name: digits}}
train: {{epochs: 3}}
growth: {{sites: ["blocks.0"]}}
library: {{path: "{tmp_path}/library"}}
slow_track: {{wait_seconds: 0}}
compare: false
out: "{tmp_path}/run"
""")
    assert train.run(config, EXAMPLES / "here.yaml") == 0
    run = read_run(tmp_path / "run")
    assert len(run.epochs) == 3
    warnings = [r.payload for r in run.audit
                if isinstance(r.payload, Event) and "warning" in r.payload.body]
    assert len(warnings) == 1 and warnings[0].topic is Topic.CAPACITY
    told = warnings[0].body["warning"]
    assert "the slow track has ended" in told and "slowtrack.log" in told
    assert capsys.readouterr().out.count(told) == 1
    assert [row.trigger for row in trail(run) if row.outcome == "warning"] == [told]
