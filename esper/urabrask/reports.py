"""Reports in the JSON format of pytest-benchmark, for `pytest-benchmark compare`."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper.leyline.verdict import Hardware, Measurement, ValidationReport, outliers

# Of the format, not of any installed package: the oldest pytest-benchmark of that layout.
_FORMAT = "4.0.0"


def to_benchmark_json(reports: Sequence[ValidationReport]) -> dict[str, Any]:
    """All measurements of `reports`, raw samples too; the sides of one shape form a group.

    Write it with `json.dump` and compare with `pytest-benchmark compare FILE --group-by=group`.
    Reports without measurements contribute nothing. What pytest-benchmark has no place for is
    in `extra_info`.
    """
    where = next((r.hardware for r in reports if r.hardware is not None), None)
    return {
        "machine_info": _machine(where),
        "commit_info": {
            "id": "unversioned",
            "time": None,
            "author_time": None,
            "dirty": False,
            "project": "esper",
            "branch": "(unknown)",
        },
        "benchmarks": [
            entry for r in reports for m in r.measurements for entry in _entries(r, m)
        ],
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": _FORMAT,
    }


def _machine(where: Hardware | None) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "node": "",  # nobody needs the name of the machine, and some mind
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
    }
    if where is not None:
        machine["cpu"] = {"brand_raw": where.cpu, "count": where.cores, "isa": where.isa}
    return machine


def _entries(report: ValidationReport, m: Measurement) -> list[dict[str, Any]]:
    """The whole step of every side, then forward and backward from single calls."""
    steps = {"kernel": m.kernel_seconds, "eager": m.eager_seconds, "compile": m.compiled_seconds}
    whole = {
        "speedup": m.speedup, "low": m.low, "high": m.high, "verdict": str(m.verdict),
        "stopped": m.stopped, "note": m.note,
        "peak_bytes": m.peak_bytes, "eager_peak_bytes": m.eager_peak_bytes,
        "cost": None if m.cost is None else m.cost.model_dump(),
        "accepted": report.accepted, "reason": report.reason,
        "tags": {t.name: t.model_dump(mode="json") for t in report.tags},
        "drift": [d.model_dump(mode="json") for d in report.drift],
        "risk": None if report.risk is None else report.risk.model_dump(),
        "roofline": None if report.roofline is None else report.roofline.model_dump(),
    }
    made = _group(report.kernel_id, m, "", steps, whole)
    for name, part in (("forward", m.forward), ("backward", m.backward)):
        if part is not None:
            sides = {
                "kernel": part.kernel.seconds, "eager": part.eager.seconds,
                "compile": None if part.compiled is None else part.compiled.seconds,
            }
            ratio = {"speedup": part.speedup, "low": part.low, "high": part.high}
            made += _group(report.kernel_id, m, f" {name}", sides, ratio)
    return made


def _group(
    kernel_id: str,
    m: Measurement,
    part: str,
    sides: Mapping[str, Sequence[float] | None],
    extra: dict[str, Any],
) -> list[dict[str, Any]]:
    where = f"{kernel_id}-{m.batch}-{m.space}{part.replace(' ', '-')}"
    return [
        {
            "group": f"{kernel_id}[batch={m.batch},space={m.space}]{part}",
            "name": f"{side}[{where}]",
            "fullname": f"urabrask::{side}[{where}]",
            "params": {"batch": m.batch, "space": m.space, "side": side},
            "param": where,
            # Indices into the samples: flagged, and among them all the same.
            "extra_info": {**extra, "outliers": list(outliers(samples))},
            "options": {
                "disable_gc": False,
                "timer": "perf_counter",
                "min_rounds": 1,
                "max_time": 0.0,
                "min_time": 0.0,
                "warmup": True,
            },
            "stats": _stats(samples),
        }
        for side, samples in sides.items() if samples
    ]


def _stats(samples: Sequence[float]) -> dict[str, Any]:
    """The figures pytest-benchmark derives from raw samples, by its own definitions."""
    x = np.sort(np.asarray(samples, dtype=np.float64))
    q1, median, q3 = (float(q) for q in np.percentile(x, [25, 50, 75]))
    iqr = q3 - q1
    mean = float(x.mean())
    deviation = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    inside = x[(x >= q1 - 1.5 * iqr) & (x <= q3 + 1.5 * iqr)]
    iqr_outliers = len(x) - len(inside)
    deviation_outliers = int((np.abs(x - mean) > deviation).sum())
    return {
        "min": float(x[0]),
        "max": float(x[-1]),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(x),
        "median": median,
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": iqr_outliers,
        "stddev_outliers": deviation_outliers,
        "outliers": f"{deviation_outliers};{iqr_outliers}",
        "ld15iqr": float(inside[0]),
        "hd15iqr": float(inside[-1]),
        "ops": 1 / mean,
        "total": float(x.sum()),
        "data": [float(s) for s in samples],
        "iterations": 1,
    }
