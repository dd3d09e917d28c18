"""The page of a benchmark: whole for a whole report, and plain about what is absent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esper.leyline.verdict import (
    CalibrationBin,
    Cost,
    Drift,
    Latency,
    Measurement,
    Part,
    RiskCalibration,
    Roofline,
    ValidationReport,
)
from esper.nissa.bench_page import Entry, write_page
from tests.urabrask.test_tags import OLD, manifest, measurement, report

VERSIONS = {"torch": "2.13.0"}


def _whole(batch: int) -> Measurement:
    def part(kernel: float) -> Part:
        def side(mean: float) -> Latency:
            return Latency(seconds=tuple(mean * (1 + i % 7 / 50) for i in range(120)))

        return Part(kernel=side(kernel), eager=side(2 * kernel), compiled=side(1.5 * kernel),
                    speedup=2.0, low=1.9, high=2.1)

    return measurement(1.3).model_copy(update={
        "batch": batch, "forward": part(1e-4 * batch), "backward": part(2e-4 * batch),
        "compiled_seconds": (2e-3, 2e-3), "stopped": "narrow", "peak_bytes": 1000,
        "eager_peak_bytes": 2000, "cost": Cost(flops=10_000 * batch, bytes=4_000)})


@pytest.fixture
def whole() -> ValidationReport:
    return report().model_copy(update={
        "measurements": (_whole(1), _whole(16)),
        "drift": (Drift(dtype="bfloat16", steps=20, kernel=0.01, eager=0.02),),
        "roofline": Roofline(memory_bytes_per_second=1e10, cache_bytes_per_second=1e11,
                             flops_per_second=1e11, dtype="float32")})


def _page(folder: Path, *reports: ValidationReport, **more: RiskCalibration) -> str:
    entries = [Entry(f"<{i}>", manifest(f"k-{i}"), r) for i, r in enumerate(reports)]
    return write_page(folder / "bench.html", entries, versions=VERSIONS, **more).read_text()


def test_a_page_shows_all_that_was_measured(whole: ValidationReport, tmp_path: Path) -> None:
    html = _page(tmp_path, whole, whole)
    assert "2 kernels: 1.43 times as fast as eager, 2.00 times as fast as torch.compile" in html
    for heading in ("Time of a step by batch", "Single steps at batch 16", "Under the roofs",
                    "Precision drift", "How it was measured"):
        assert heading in html
    assert html.count('class="at kernel"') == 2 * 2 * 4  # desk and phone, latency and roofline
    assert "forward <b>2.00</b>" in html and "bfloat16" in html
    assert "&lt;0&gt;" in html and "<0>" not in html  # names come from outside


def test_a_page_needs_nothing_else(whole: ValidationReport, tmp_path: Path) -> None:
    html = _page(tmp_path, whole, whole)
    assert not re.search(r"""src\s*=|href\s*=\s*"[^#]|url\(|@import|<script""", html)
    assert 'href="#kernel2"' in html and 'id="kernel2"' in html


def test_an_old_report_and_a_refusal_say_what_is_missing(tmp_path: Path) -> None:
    old = ValidationReport.model_validate_json((OLD / "validated_0.1.0.json").read_bytes())
    refused = ValidationReport(kernel_id="k", accepted=False, reason="wrong <at odd sizes",
                               seconds=1.0)
    html = _page(tmp_path, old, refused)
    assert "1 of 2 refused" in html and "wrong &lt;at odd sizes" in html
    assert "not measured" in html
    assert "Under the roofs" not in html and "torch.compile" not in html.partition("</h1>")[0]
    assert "No kernel was accepted" in _page(tmp_path, refused)


def test_calibration_is_shown_where_there_is_one(whole: ValidationReport, tmp_path: Path) -> None:
    assert "How far the risk can be trusted" not in _page(tmp_path, whole)
    curve = tuple(CalibrationBin(predicted=p, observed=p + 0.05, count=20) for p in (0.2, 0.7))
    html = _page(tmp_path, whole, calibration=RiskCalibration(
        reports=40, kernels=12, failures=18, brier=0.17, rules_brier=0.22, base_brier=0.24,
        curve=curve))
    assert "How far the risk can be trusted" in html and "0.170" in html
    assert "20 reports: predicted 0.20, observed 0.25" in html
