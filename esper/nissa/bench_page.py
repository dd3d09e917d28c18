"""The page of a benchmark: one HTML file that needs nothing else, in the look of a run's report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from esper.files import write_whole
from esper.leyline.artifact import Manifest
from esper.leyline.verdict import (
    Latency,
    Measurement,
    RiskCalibration,
    Roofline,
    ValidationReport,
    outliers,
)
from esper.nissa import bench_charts, charts
from esper.nissa.bench_charts import Point, Spot
from esper.nissa.charts import duration, short_number

DESK, PHONE = 860.0, 350.0
SIDES = ("kernel", "eager", "compiled")


@dataclass(frozen=True)
class Entry:
    """One kernel of the page; `name` is its blueprint's, for people."""

    name: str
    manifest: Manifest
    report: ValidationReport


def write_page(
    target: Path,
    entries: Sequence[Entry],
    *,
    versions: Mapping[str, str],
    calibration: RiskCalibration | None = None,
) -> Path:
    """Write the page of `entries`; the file appears whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    html = environment.get_template("bench.html.j2").render(
        headline=_headline(entries),
        figures=_figures(entries),
        kernels=[_kernel(e, _limit(entries)) for e in entries],
        calibration=calibration,
        curve=None if calibration is None else _both(
            lambda width: bench_charts.calibration("calibration of the risk", calibration,
                                                   width=width)),
        environment=_environment(entries, versions),
    )
    write_whole(target, html.encode())
    return target


def _both(draw: Callable[[float], str]) -> Markup | None:
    """The chart for a desk and for a phone; the page shows one of them."""
    wide = draw(DESK)
    if not wide:
        return None
    # Everything that came from outside was escaped where the SVG was put together.
    return Markup(f'<div class="desk">{wide}</div><div class="phone">{draw(PHONE)}</div>')


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.geometric_mean(known) if known else None


def _headline(entries: Sequence[Entry]) -> str:
    accepted = [e for e in entries if e.report.accepted]
    refused = len(entries) - len(accepted)
    tail = f"; {refused} of {len(entries)} refused" if refused else ""
    eager = _mean([e.report.speedup for e in accepted])
    if eager is None:
        return f"No kernel was accepted of {len(entries)}"
    what = accepted[0].name if len(accepted) == 1 else f"{len(accepted)} kernels"
    words = f"{what}: {eager:.2f} times as fast as eager"
    over = _mean([e.report.speedup_over_compile for e in accepted])
    if over is not None:
        words += f", {over:.2f} times as fast as torch.compile"
    return words + tail


def _figures(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """(name, value, beside it)."""
    made = []
    accepted = [e.report for e in entries if e.report.accepted]
    ratios = [m.speedup for r in accepted for m in r.measurements]
    if ratios:
        made.append(("over eager", f"{statistics.geometric_mean(ratios):.2f}",
                     f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} shapes"))
    over = [r for x in accepted for m in x.measurements if (r := _over_compile(m)) is not None]
    if over:
        made.append(("over torch.compile", f"{statistics.geometric_mean(over):.2f}",
                     f"{min(over):.2f} to {max(over):.2f}, static shapes"))
    roof = next((r.roofline for r in accepted if r.roofline is not None), None)
    if roof is not None:
        made.append(("matrix product", f"{short_number(roof.flops_per_second)}FLOP/s",
                     f"{roof.dtype}, the peak reached here"))
        made.append(("memory", f"{short_number(roof.memory_bytes_per_second)}B/s",
                     f"{short_number(roof.cache_bytes_per_second)}B/s in cache"))
    return made


def _over_compile(m: Measurement) -> float | None:
    if not m.compiled_seconds:
        return None
    return statistics.median(m.compiled_seconds) / statistics.median(m.kernel_seconds)


def _limit(entries: Sequence[Entry]) -> float:
    ends = [v for e in entries for m in e.report.measurements for v in (m.low, m.high) if v > 0]
    return max([1.5, *(max(v, 1 / v) for v in ends)]) * 1.05


def _steps(m: Measurement) -> dict[str, list[float]]:
    """Single steps of each side, forward and backward of one call added up."""
    if m.forward is None or m.backward is None:
        return {}
    found = {}
    for side in SIDES:
        halves = getattr(m.forward, side), getattr(m.backward, side)
        if None not in halves:
            found[side] = [f + b for f, b in zip(*(h.seconds for h in halves), strict=True)]
    return found


def _points(measurements: Sequence[Measurement]) -> dict[str, list[Point]]:
    made: dict[str, list[Point]] = {}
    for m in measurements:
        for side, seconds in _steps(m).items():
            whole = Latency(seconds=tuple(seconds))
            made.setdefault(side, []).append(Point(m.batch, whole.p50, whole.p99))
    return made


def _spots(measurements: Sequence[Measurement]) -> list[Spot]:
    made = []
    for m in measurements:
        if m.cost is None:
            continue
        sides = {"eager": m.eager_seconds, "kernel": m.kernel_seconds}
        if m.compiled_seconds:
            sides = {"compiled": m.compiled_seconds, **sides}
        made += [Spot(side, m.batch, m.cost.flops / m.cost.bytes,
                      m.cost.flops / statistics.median(seconds))
                 for side, seconds in sides.items()]
    return made


def _row(m: Measurement, roof: Roofline | None, limit: float) -> dict[str, Any]:
    steps = {side: Latency(seconds=tuple(s)) for side, s in _steps(m).items()}
    share = None
    if roof is not None and m.cost is not None:
        least = max(m.cost.flops / roof.flops_per_second,
                    m.cost.bytes / roof.memory_bytes_per_second)
        share = least / statistics.median(m.kernel_seconds)
    over = _over_compile(m)
    return {
        "batch": m.batch, "space": m.space, "m": m, "note": m.note,
        "picture": Markup(charts.interval(m.speedup, m.low, m.high, limit)),
        "over": None if over is None else f"{over:.2f}",
        "sides": [
            (side, duration(x.mean), duration(x.p50), None if x.p99 is None else duration(x.p99))
            for side, x in steps.items()
        ],
        "parts": [
            (name, f"{p.speedup:.2f}", f"{p.low:.2f}", f"{p.high:.2f}", duration(p.kernel.p50),
             duration(p.eager.p50))
            for name, p in (("forward", m.forward), ("backward", m.backward)) if p is not None
        ],
        "throughput": short_number(m.samples_per_second),
        "peak": None if m.peak_bytes is None else short_number(m.peak_bytes),
        "eager_peak": None if m.eager_peak_bytes is None else short_number(m.eager_peak_bytes),
        "share": None if share is None else f"{share:.0%}",
        "outliers": len(m.outliers), "rounds": len(m.kernel_seconds), "stopped": m.stopped,
        "eager_outliers": len(outliers(m.eager_seconds)),
    }


def _kernel(entry: Entry, limit: float) -> dict[str, Any]:
    report, measured = entry.report, entry.report.measurements
    largest = measured[-1] if measured else None
    roof = report.roofline
    points, spots = _points(measured), _spots(measured)
    return {
        "name": entry.name, "identifier": entry.manifest.kernel_id, "report": report,
        "site": str(entry.manifest.signature), "pipeline": str(entry.manifest.pipeline).lower(),
        "cases": len(report.proof), "passed": sum(c.passed for c in report.proof),
        "worst": max((c.worst_ratio for c in report.proof), default=None),
        "rows": [_row(m, roof, limit) for m in measured],
        "has_compiled": "compiled" in points,
        "latency": _both(lambda width: bench_charts.latency(
            "time of a step by batch size", points, width=width)) if points else None,
        "roofline": _both(lambda width: bench_charts.roofline(
            "operations a second under the roofs of this machine", roof, spots, width=width))
        if roof is not None and spots else None,
        "distribution": _both(lambda width: bench_charts.distribution(
            "distribution of single steps", _steps(largest), width=width))
        if largest is not None else None,
        "largest": largest,
        "drift": [(d.dtype, d.steps, f"{d.kernel:.2g}", f"{d.eager:.2g}") for d in report.drift],
    }


def _environment(
    entries: Sequence[Entry], versions: Mapping[str, str]
) -> list[tuple[str, str]]:
    where = next((e.report.hardware for e in entries if e.report.hardware is not None), None)
    facts = [("measured", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))]
    if where is not None:
        facts += [("processor", where.cpu), ("instruction set", where.isa),
                  ("threads", f"{where.threads} of {where.cores} cores")]
    return facts + sorted(versions.items())
