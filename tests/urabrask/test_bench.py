"""The statistics: no difference where there is none, the right one where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import Hardware, SpeedVerdict, ValidationReport
from esper.urabrask import bench
from esper.urabrask.examine import examine
from esper.urabrask.oracle import FULL, reference_kernel
from esper.urabrask.proof import Proof
from esper.urabrask.reports import to_benchmark_json
from esper.urabrask.tags import tags
from tests.urabrask.test_proof import FEATURES, SITE

HONEST = reference_kernel(FEATURES, SITE)
WHERE = Hardware(cpu="a cpu", isa="AVX2", cores=2, threads=1)


def _twice(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    """Right, and half as fast: everything is computed two times, backward too."""
    once, again = HONEST(h, params, alpha, mode), HONEST(h, params, alpha, mode)
    if mode != FULL or alpha in (0, 1):
        return once
    return once / 2 + again / 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, SpeedVerdict.FAST),
        (1.05, 1.2, SpeedVerdict.AMBIGUOUS),
        (0.96, 1.04, SpeedVerdict.SAME),
        (0.94, 1.04, SpeedVerdict.AMBIGUOUS),
        (0.5, 0.94, SpeedVerdict.SLOW),
        (0.5, 2.0, SpeedVerdict.AMBIGUOUS),
    ],
)
def test_the_verdict_needs_the_whole_interval(
    low: float, high: float, verdict: SpeedVerdict
) -> None:
    assert bench.judge(low, high) is verdict


def test_the_interval_covers_the_true_ratio_of_simulated_rounds() -> None:
    """Rounds with noise common to both sides and heavy outliers; the truth is 1.3."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        common = rng.lognormal(0, 0.2, 60)
        spikes = 1 + 20 * (rng.random(60) < 0.05)
        kernel = common * rng.lognormal(0, 0.03, 60)
        eager = 1.3 * common * rng.lognormal(0, 0.03, 60) * spikes
        _, low, high = bench.interval(list(kernel), list(eager), rng)
        covered += low <= 1.3 <= high
    assert covered >= 88


def test_the_same_interval_comes_of_the_same_seed() -> None:
    samples = [float(x) for x in np.random.default_rng(1).lognormal(0, 0.1, 30)]
    first, second = (
        bench.interval(samples, samples[::-1], np.random.default_rng(7)) for _ in range(2)
    )
    assert first == second


def test_a_against_a_is_hardly_ever_fast() -> None:
    found = bench.self_test(20, budget_seconds=0.1)
    assert found.runs == 20
    assert found.false_fast_rate <= 0.05


def test_half_as_fast_is_slow_and_the_samples_are_kept() -> None:
    found = bench.measure(_twice, FEATURES, SITE, 64, 8, budget_seconds=1.0)
    assert found.verdict is SpeedVerdict.SLOW, found
    assert 0.3 < found.speedup < 0.75
    assert len(found.kernel_seconds) == len(found.eager_seconds) >= 3
    ratio = np.median(found.eager_seconds) / np.median(found.kernel_seconds)
    assert found.speedup == pytest.approx(ratio)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.ones(1000)

    def all_at_once() -> int:
        return len([torch.ones(1000) for _ in range(5)])

    assert 4000 <= (bench.peak_bytes(one_after_the_other) or 0) < 8000
    assert 20000 <= (bench.peak_bytes(all_at_once) or 0) < 25000


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    return examine("k-slow", _twice, FEATURES, SITE, bench_seconds=0.3)


def test_slow_is_no_reason_to_refuse_and_earns_no_speed_tag(report: ValidationReport) -> None:
    assert report.accepted, report.reason
    assert len(report.measurements) == 2
    assert all(m.verdict is SpeedVerdict.SLOW for m in report.measurements)
    assert report.speedup is not None and report.speedup < 0.8
    assert "high_speed" not in {t.name for t in report.tags}
    assert report.hardware is not None and report.hardware.threads == 1
    assert report.peak_memory_bytes


def test_a_refused_kernel_is_not_measured() -> None:
    refused = examine(
        "k-wrong", lambda h, p, a, m: HONEST(h, p, a, m) * 1.001, FEATURES, SITE
    )
    assert not refused.accepted and refused.reason
    assert refused.measurements == () and refused.speedup is None and refused.tags == ()


def test_high_speed_needs_every_shape_and_quotes_the_lowest_bound(
    report: ValidationReport,
) -> None:
    proof = Proof(report.proof)
    fast = report.measurements[0].model_copy(
        update={"speedup": 1.4, "low": 1.3, "high": 1.5, "verdict": SpeedVerdict.FAST}
    )
    faster = fast.model_copy(update={"low": 1.06})

    def names(*measured: object) -> dict[str, float]:
        found = tags(FEATURES, SITE, proof, measured, (None, None), WHERE)  # type: ignore[arg-type]
        assert all(t.evidence for t in found)
        return {t.name: t.value for t in found}

    assert names(fast, faster)["high_speed"] == 1.06
    assert "high_speed" not in names(fast, report.measurements[0])
    assert "high_speed" not in names()
    assert "low_memory" not in names(fast)  # not measured is not low


def test_tags_quote_memory_and_parameters(report: ValidationReport) -> None:
    proof = Proof(report.proof)
    low = {t.name: t for t in tags(FEATURES, SITE, proof, (), (70, 100), WHERE)}
    assert low["low_memory"].value == 0.7 and "AVX2" in low["low_memory"].evidence
    assert "few_parameters" not in low  # a block twice as wide as the site has plenty
    high = {t.name for t in tags(FEATURES, SITE, proof, (), (90, 100), WHERE)}
    assert "low_memory" not in high


def test_a_kernel_that_hoards_memory_is_refused() -> None:
    site = SiteSignature(kind=SiteKind.FEATURES, channels=16)

    def hoards(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        waste = torch.ones(1 << 20)
        out = HONEST(h, params, alpha, mode)
        return out + 0 * waste[0] if mode == FULL and alpha == 0.5 else out

    found = examine("k-hoards", hoards, FEATURES, site, bench_seconds=0.1)
    assert not found.accepted and found.reason.startswith("memory: a step holds")


def test_pytest_benchmark_compares_the_reports(report: ValidationReport, tmp_path: Path) -> None:
    path = tmp_path / "0001_urabrask.json"
    path.write_text(json.dumps(to_benchmark_json([report])))
    table = tmp_path / "table.csv"
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--group-by=group",
         f"--csv={table}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "kernel[k-slow-16-8]" in done.stdout and "eager[k-slow-256-8]" in done.stdout
    assert table.read_text().count("k-slow") >= 4
