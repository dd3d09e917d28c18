"""The page of `make bench` is drawn from what pytest-benchmark really writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_call, bench_nn
from benchmarks.page import Ratio, read, write_page
from esper.leyline.artifact import Pipeline

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

def test_loop(benchmark):
    benchmark.extra_info["calls"] = 1000
    benchmark.pedantic(time.sleep, args=(1e-2,), rounds=5)

def test_whole_measurement(benchmark):
    benchmark.extra_info["untimed"] = True
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
    timed, ratios, *_ = read(json.loads(results.read_text()))
    assert {t.contestant for t in timed if t.is_limit} == {"bound"}
    assert [r.met for r in ratios] == [False]


def test_a_loop_is_listed_by_the_call_and_the_measuring_itself_is_not(results: Path) -> None:
    raw = json.loads(results.read_text())
    timed = {t.name: t for t in read(raw).timed}
    stats = next(b["stats"] for b in raw["benchmarks"] if b["name"] == "test_loop")
    assert timed["test_loop"].median == pytest.approx(stats["median"] / 1000)
    assert 1e-5 <= timed["test_loop"].low <= timed["test_loop"].median <= timed["test_loop"].high
    assert "test_whole_measurement" not in timed


def call_rows(names: dict[str, str], over_us: float) -> list[dict[str, Any]]:
    """As `bench_call` measures them, `over_us` more over the runner with every further call."""
    return [
        bench_call.row(batch, kind, name, [1e-6 * (10 + n * over_us)] * 3, [1e-5] * 3)
        for batch in bench_call.BATCHES
        for kind in ("forward", "forward with a graph", "forward and backward")
        for n, name in enumerate(names, 1)
    ]


def bench(results: Path, name: str, **info: Any) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it, with other `extra_info`."""
    known = json.loads(results.read_text())["benchmarks"][-1]
    return {**known, "name": name, "fullname": f"b.py::{name}", "extra_info": info}


def test_call_overhead_of_two_benchmarks_is_one_plot(results: Path, tmp_path: Path) -> None:
    names = bench_call.OURS | bench_call.PEERS
    raw = json.loads(results.read_text())
    raw["benchmarks"] = [
        bench(results, "calls", untimed=True,
              series=bench_call.overhead(call_rows(names, 2.0), names)),
        bench(results, "peft", untimed=True, series=bench_call.overhead(
            call_rows(bench_call.PEFT, -3.0), bench_call.PEFT)),
    ]
    timed = [t for t in read(raw).timed if t.group == "call overhead, forward"]
    assert {t.contestant for t in timed} == {*names.values(), *bench_call.PEFT.values()}
    ours = {t.size: t.median for t in timed if t.contestant == "esper"}
    assert ours == pytest.approx(dict.fromkeys(bench_call.BATCHES, 2e-6))
    write_page(raw, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2, "forward, and forward with a graph"
    # matplotlib draws text as paths and keeps the text itself as a comment
    assert "torch.library.custom_op" in text
    assert "peft, over its arithmetic by hand (at 1: -3 µs" in text, "nothing is dropped silently"


def test_series_without_a_size_are_bars_beside_their_limit(results: Path) -> None:
    raw = json.loads(results.read_text())
    raw["benchmarks"] = [bench(results, "unary", untimed=True, series={"p50": {
        "size_unit": "", "limits": ["bare"],
        "lines": {"esper, over gRPC": [[None, 3e-4]], "bare": [[None, 2e-4]]}}})]
    timed = read(raw).timed
    assert [(t.contestant, t.is_ours, t.is_limit) for t in timed] == [
        ("esper, over gRPC", True, False), ("bare", False, True)]
    assert {t.size for t in timed} == {None}


def test_speedups_over_both_peers_are_drawn(results: Path, tmp_path: Path) -> None:
    rows = {
        "low rank [4, 16, 64]": {"over_eager": (2.0, 1.9, 2.1), "over_compile": (0.5, 0.4, 0.6)},
        "attention [4, 16, 64]": {"over_eager": (8.0, 7.9, 8.1), "over_compile": (2.0, 1.9, 2.1)},
    }
    raw = json.loads(results.read_text())
    raw["benchmarks"] = [bench(results, "zoo", untimed=True,
                               speedups=bench_nn.speedups(rows, Pipeline.STANDARD))]
    speedups = read(raw).speedups
    over_eager = speedups["zoo, STANDARD, times as fast as eager"]
    assert over_eager["low rank [4, 16, 64]"] == (2.0, 1.9, 2.1)
    value, *interval = over_eager["geometric mean"]
    assert value == pytest.approx(4.0) and all(map(math.isnan, interval))
    write_page(raw, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2 and "torch.compile" in text


def test_whole_runs_are_drawn_step_by_step(results: Path, tmp_path: Path) -> None:
    raw = json.loads(results.read_text())
    run = {"seconds": [1e-3, 2e-3, 4.0, 1e-3], "marks": [2]}
    raw["benchmarks"] = [bench(results, "growths", untimed=True, traces={"steps": {
        "esper": {**run, "seconds": [1e-3, 1e-3, 2e-3, 1e-3]}, "naive": run}})]
    write_page(raw, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 1
    assert "esper: longest 2 ms, median 1 ms" in text and "naive: longest 4 s" in text


@pytest.mark.parametrize(
    ("target", "met"),
    [("<= 1.01", False), (">= 1.3", True), ("<= 10 s", True), ("0 compilations", None), ("", None)],
)
def test_a_target_is_met_where_it_is_a_bound(target: str, met: bool | None) -> None:
    assert Ratio("r", 1.5, 1.4, 1.6, target, "").met is met
