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

from esper.kasmina.artifact import Kernel
from esper.leyline.mode import FULL
from esper.leyline.verdict import SpeedVerdict, ValidationReport, outliers
from esper.urabrask import bench
from esper.urabrask.clock import Watch, clock
from esper.urabrask.examine import Subject, measure_only
from esper.urabrask.memory import peak_bytes
from esper.urabrask.oracle import reference_kernel
from esper.urabrask.plan import Plan
from esper.urabrask.reports import to_benchmark_json
from tests.urabrask.test_proof import FEATURES, SITE

HONEST = reference_kernel(FEATURES, SITE)
SHORT = Plan(seconds=1.0)


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
    assert found.false_fast_rate < found.at_most < 0.3


def test_the_bound_of_a_rate_that_was_never_seen() -> None:
    """None in n leaves a bound of 1 - 0.05 ** (1 / n), about three over n."""
    assert bench.SelfTest(100, 0, 0, 0.1).at_most == pytest.approx(1 - 0.05**0.01)


def test_outliers_are_flagged_and_kept() -> None:
    samples = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 9.0, 1.0, 0.99]
    assert outliers(samples) == (7,)
    assert outliers([1.0, 5.0, 1.0]) == ()


def test_a_clock_that_stands_still_for_one_side_is_noticed() -> None:
    watch = Watch(2)
    for _ in range(9):
        watch.add(0, 0.5e-3, 1e-3)
        watch.add(1, 1e-3, 1e-3)
    assert "0.5 times as long" in watch.objection()
    fine = Watch(1)
    fine.add(0, 1e-3, 1.001e-3)
    assert fine.objection() == ""


def _measured(kernel: Kernel, plan: Plan = SHORT) -> ValidationReport:
    return measure_only(Subject("k-slow", kernel, FEATURES, SITE), plan)


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    return _measured(_twice)


def test_slow_is_no_reason_to_refuse_and_the_samples_are_kept(report: ValidationReport) -> None:
    assert report.accepted, report.reason
    assert len(report.measurements) == 2
    for m in report.measurements:
        # On a busy machine the interval may be wide, but never all above 1.
        assert m.verdict in (SpeedVerdict.SLOW, SpeedVerdict.AMBIGUOUS), (m.speedup, m.low, m.high)
        assert len(m.kernel_seconds) == len(m.eager_seconds) >= 10
        ratio = np.median(m.eager_seconds) / np.median(m.kernel_seconds)
        assert m.speedup == pytest.approx(ratio)
        assert m.compiled_seconds == () and m.stopped in ("narrow", "time", "rounds")
    assert report.speedup is not None and report.speedup < 0.8
    assert report.speedup_over_compile is None
    assert report.hardware is not None and report.hardware.threads == 1


def test_forward_and_backward_are_measured_apart(report: ValidationReport) -> None:
    for m in report.measurements:
        assert m.forward is not None and m.backward is not None
        for part in (m.forward, m.backward):
            assert part.low <= part.speedup <= part.high
            assert len(part.kernel.seconds) == len(part.eager.seconds) >= 10
            assert part.kernel.p50 <= (part.kernel.p99 or np.inf)
        both = m.forward.kernel.p50 + m.backward.kernel.p50
        assert 0.3 < both / np.median(m.kernel_seconds) < 3
        assert m.samples_per_second == pytest.approx(m.batch / np.median(m.kernel_seconds))


def test_costs_and_roofs(report: ValidationReport) -> None:
    roof = report.roofline
    assert roof is not None and roof.flops_per_second > 1e8
    assert roof.cache_bytes_per_second > 1e8 and roof.memory_bytes_per_second > 1e8
    cost = report.measurements[0].cost
    assert cost is not None
    parameters = 16 + 16 + 32 * 16 + 32 + 16 * 32 + 16
    assert cost.bytes == 4 * (4 * 16 * 16 + 2 * parameters)
    products = 2 * 2 * 16 * 32 * 16  # two matrices, a multiply and an add each, batch 16
    assert 3 * products < cost.flops < 3.5 * products


def test_drift_of_a_kernel_that_rounds_is_eagers_own(report: ValidationReport) -> None:
    drift = {d.dtype: d for d in report.drift}
    assert set(drift) == {"float32", "bfloat16"}
    assert drift["float32"].kernel < 1e-5 < drift["bfloat16"].eager < 0.3
    assert drift["bfloat16"].kernel < 2 * drift["bfloat16"].eager


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.ones(1000)

    def all_at_once() -> int:
        return len([torch.ones(1000) for _ in range(5)])

    assert 4000 <= (peak_bytes(one_after_the_other) or 0) < 8000
    assert 20000 <= (peak_bytes(all_at_once) or 0) < 25000


def test_a_kernel_that_hoards_memory_is_refused() -> None:
    def hoards(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        waste = torch.ones(1 << 20)
        return HONEST(h, params, alpha, mode) + 0 * waste[0]

    found = _measured(hoards, Plan(seconds=0.1))
    assert not found.accepted and found.reason.startswith("memory: a step holds")


def test_a_result_remembered_by_address_is_refused() -> None:
    """In the proof every call brings new tensors; a benchmark would be the place to cheat."""
    known: dict[int, Tensor] = {}

    def remembers(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        out = HONEST(h, params, alpha, mode)
        return out + (known.setdefault(h.data_ptr(), out.detach().clone()) - out.detach())

    found = _measured(remembers, Plan(seconds=0.1))
    assert not found.accepted
    assert "did not do its work: output: error" in found.reason


def test_a_replaced_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        monkeypatch.setattr(time, "perf_counter", lambda: 0.9 * clock())
        return HONEST(h, params, alpha, mode)

    found = _measured(kernel, Plan(seconds=0.1))
    monkeypatch.undo()
    assert not found.accepted and "replaces time.perf_counter" in found.reason


def test_settings_that_slow_eager_down_are_refused() -> None:
    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        torch.set_flush_denormal(True)
        return HONEST(h, params, alpha, mode)

    try:
        found = _measured(kernel, Plan(seconds=0.1))
    finally:
        torch.set_flush_denormal(False)
    assert not found.accepted and "denormal numbers" in found.reason


@pytest.mark.slow
def test_torch_compile_is_a_side_of_a_thorough_measurement() -> None:
    subject = Subject("k-slow", _twice, FEATURES, SITE)
    found = measure_only(subject, Plan(seconds=0.3, calls=20, thorough=True))
    assert found.accepted, found.reason
    assert [m.batch for m in found.measurements] == [1, 16, 64, 256]
    for m in found.measurements:
        assert m.compiled_seconds and not m.note
        assert m.forward is not None and m.forward.compiled is not None
    assert found.speedup_over_compile is not None


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
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "kernel[k-slow-16-8]" in done.stdout and "eager[k-slow-256-8]" in done.stdout
    assert table.read_text().count("k-slow") >= 4
