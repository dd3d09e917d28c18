"""docs/checkpoints.md does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import esper
from esper.cli.config import CheckpointConfig
from esper.cli.main import parser

GUIDE = (Path(__file__).parents[1] / "docs/checkpoints.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_its_commands_and_its_configuration_are_understood() -> None:
    for line in "\n".join(blocks("bash")).splitlines():
        command = shlex.split(line.partition("#")[0])
        assert command[0] == "esper"
        parser().parse_args(command[1:])
    (section,) = blocks("yaml")
    CheckpointConfig.model_validate(yaml.safe_load(section)["checkpoint"])


def test_its_loop_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = blocks("python")
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 16, generator=generator),
                torch.randint(0, 2, (8,), generator=generator)) for _ in range(9)]

    class Killed(Exception):
        pass

    def run(resuming: bool, kill_at: int | None = None) -> torch.Tensor:
        names: dict[str, Any] = {"batches": batches[1:], "holdout": batches[:1],
                                 "resuming": resuming}

        def step(self: Any, loss: torch.Tensor, real: Any = esper.Session.step) -> bool:
            good = real(self, loss)
            self.checkpoints.wait()
            if self.growth.step == kill_at:
                raise Killed
            return bool(good)

        with monkeypatch.context() as m:
            m.setattr(esper.Session, "step", step)
            exec(source, names)
        return torch.cat([p.detach().flatten() for p in names["model"].parameters()])

    whole = run(False)
    for path in sorted((tmp_path / "kept").iterdir()):
        path.rename(path.with_name(f"gone-{path.name}"))
    with pytest.raises(Killed):
        run(False, kill_at=12)  # the checkpoint is of step 10, in the middle of the second epoch
    assert torch.equal(run(True), whole)
