"""`esper simulate` from the file to the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from esper.cli.config import load_yaml
from esper.cli.main import main
from esper.errors import ConfigError
from esper.oona.load import Load

EXAMPLE = Path(__file__).parents[2] / "examples" / "load.yaml"


def test_the_example_keeps_its_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(EXAMPLE), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("kept  ") == 3 and "BROKEN" not in said and "load.html" in said
    figures = json.loads((tmp_path / "load.json").read_text())
    assert [r["factor"] for r in figures["replays"]] == [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert all(p["kept"] for p in figures["promises"])
    last = figures["replays"][-1]["priorities"]
    assert last["BACKGROUND"]["dropped"] > 0 == last["EMERGENCY"]["dropped"]
    page = (tmp_path / "load.html").read_text()
    assert page.count("<svg class=\"chart\"") == 12, "six charts, for a desk and for a phone"
    assert "The policy keeps its promises" in page and "nan" not in page


def test_a_broken_promise_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yaml.safe_load(EXAMPLE.read_text())
    given["arrivals"][0] |= {"per_hour": 100, "heeds_capacity": True}
    path = tmp_path / "shy.yaml"
    path.write_text(yaml.safe_dump(given))
    assert main(["simulate", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "BROKEN no emergency is dropped" in capsys.readouterr().out
    assert "breaks a promise" in (tmp_path / "out" / "load.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("  - {name: x, priority: normal, per_hou: 3}", "did you mean 'per_hour'"),
        ("  - {name: x, priority: urgent, per_hour: 3}", "arrivals.0.priority"),
        ("  - {name: x, priority: normal, per_hour: -1}", "arrivals.0.per_hour"),
        ("  - {name: x, priority: normal, per_hour: 1, bursts: [{at_minut: 3}]}",
         "did you mean 'at_minute'"),
        ("  - {name: x, priority: normal, per_hour: 1, interest: [0.9, 0.1]}", "lowest first"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path: Path, change: str, said: str) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(f"name: x\nhours: 1\ncompile: {{seconds: 1}}\nprove: {{seconds: 1}}\n"
                    f"arrivals:\n{change}\n")
    with pytest.raises(ConfigError, match=said):
        load_yaml(path, Load, "examples/load.yaml")
    assert main(["simulate", str(path)]) == 2
