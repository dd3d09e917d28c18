"""Reports in the JSON format of pytest-benchmark, for `pytest-benchmark compare`."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.leyline.verdict import Hardware, Measurement, ValidationReport

# Of the format, not of any installed package: the oldest pytest-benchmark of that layout.
_FORMAT = "4.0.0"


def to_benchmark_json(reports: Sequence[ValidationReport]) -> dict[str, Any]:
    """All measurements of `reports`; kernel and eager of one shape form a group.

    Write it with `json.dump` and compare with `pytest-benchmark compare FILE --group-by=group`.
    Reports without measurements contribute nothing.
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
            entry for r in reports for m in r.measurements for entry in _pair(r.kernel_id, m)
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


def _pair(kernel_id: str, m: Measurement) -> list[dict[str, Any]]:
    shape = f"batch={m.batch},space={m.space}"
    sides = (("kernel", m.kernel_seconds), ("eager", m.eager_seconds))
    return [
        {
            "group": f"{kernel_id}[{shape}]",
            "name": f"{side}[{kernel_id}-{m.batch}-{m.space}]",
            "fullname": f"urabrask::{side}[{kernel_id}-{m.batch}-{m.space}]",
            "params": {"batch": m.batch, "space": m.space, "side": side},
            "param": f"{kernel_id}-{m.batch}-{m.space}",
            "extra_info": {
                "speedup": m.speedup,
                "low": m.low,
                "high": m.high,
                "verdict": str(m.verdict),
            },
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
        for side, samples in sides
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
