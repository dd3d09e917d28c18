"""The page of `make bench` is drawn from what pytest-benchmark really writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.page import Ratio, read, write_page

ROOT = Path(__file__).parents[1]
SUITE = """
import time

import pytest

@pytest.mark.benchmark(group="nap")
@pytest.mark.parametrize("who", ["esper", "peer", "bound"])
def test_nap(benchmark, who):
    benchmark.extra_info.update(contestant=who, limit=who == "bound")
    if who == "esper":
        benchmark.extra_info.update(ratio=1.5, low=1.4, high=1.6, target="<= 1.01", unit="x")
    benchmark.pedantic(time.sleep, args=(1e-4,), rounds=5)

@pytest.mark.benchmark(group="sizes")
@pytest.mark.parametrize("size", [10, 1000])
def test_sizes(benchmark, size):
    benchmark.extra_info.update(contestant="esper", size=size, size_unit="elements")
    benchmark.pedantic(sum, args=(range(size),), rounds=5)

def test_alone(benchmark):
    benchmark.pedantic(sum, args=(range(10),), rounds=5)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "test_suite.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=r.json",
         "test_suite.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder / "r.json"


def test_bars_lines_and_ratios_are_drawn(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(json.loads(results.read_text()), page)
    text = page.read_text()
    assert text.count("<svg") == 2  # the group of three, and the group by size
    assert "missed" in text and "test_alone" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace(
        "http://creativecommons.org", "").replace("http://purl.org", "").replace(
        "https://matplotlib.org", ""), "the page is readable offline"


def test_contestants_and_limits_are_told_apart(results: Path) -> None:
    timed, ratios = read(json.loads(results.read_text()))
    assert {t.contestant for t in timed if t.is_limit} == {"bound"}
    assert [r.met for r in ratios] == [False]


@pytest.mark.parametrize(
    ("target", "met"),
    [("<= 1.01", False), (">= 1.3", True), ("<= 10 s", True), ("0 compilations", None), ("", None)],
)
def test_a_target_is_met_where_it_is_a_bound(target: str, met: bool | None) -> None:
    assert Ratio("r", 1.5, 1.4, 1.6, target, "").met is met
