"""`esper bench`, from the command line and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esper.cli.main import main


def test_it_wants_kernels_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 2
    assert "which kernels?" in capsys.readouterr().err
    assert main(["bench", "k-1", "--library", str(tmp_path)]) == 2
    assert "there is no library" in capsys.readouterr().err
    import esper

    esper.open_library(tmp_path)
    assert main(["bench", "k-1", "--library", str(tmp_path)]) == 2
    assert "the start of 0 kernel ids" in capsys.readouterr().err


def test_a_file_that_is_no_artifact_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernel.esper"
    path.write_text("not a zip")
    assert main(["bench", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "not a readable zip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_self_test_prints_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "--self-test", "5"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of 5 comparisons of one thing with itself came out FAST" in said
    assert code in (0, 1)  # five are too few to demand anything
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--self-test", "-5"])
    assert "between 1 and 100000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_is_proved_measured_and_written_down(
    feature_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["bench", str(feature_artifact), "--quick", "--out", str(out),
                 "--library", str(tmp_path)]) == 0
    assert "times as fast as eager" in capsys.readouterr().out
    html = (out / "bench.html").read_text()
    assert "features[32] float32 cpu" in html and "Under the roofs" in html
    data = json.loads((out / "bench.json").read_text())
    groups = {b["group"] for b in data["benchmarks"]}
    assert len(groups) == 6  # two shapes: whole, forward, backward
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(out / "bench.json"),
         "--group-by=group"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("eager[") == 6 and "forward" in compared.stdout
