"""The report of a replayed load: one HTML page, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from esper.files import write_whole
from esper.leyline.events import Priority
from esper.nissa.charts import Mark, Series, line_chart
from esper.nissa.page import both, write_page
from esper.oona.load import Load
from esper.oona.promises import Promise
from esper.oona.queue import LIMITS
from esper.oona.simulate import Replay, Tally

QUANTILES = (0.5, 0.95, 0.99)
QUEUE_NAMES: Mapping[str, str] = {
    "karn_to_tezzeret": "to be compiled", "tezzeret_to_urabrask": "to be proved",
    "urabrask_validation": "being proved", "urza_storage": "being stored",
}


def write_load_report(
    folder: Path, load: Load, replays: Mapping[float, Replay], promises: Sequence[Promise]
) -> tuple[Path, Path]:
    """Write `load.html` and `load.json` into `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page("load.html.j2", _context(load, replays, promises), folder / "load.html")
    data = folder / "load.json"
    write_whole(data, json.dumps(as_json(load, replays, promises), indent=1).encode())
    return page, data


def as_json(
    load: Load, replays: Mapping[float, Replay], promises: Sequence[Promise]
) -> dict[str, Any]:
    """All figures; times in seconds, `goodput` in kernels an hour."""
    return {
        "load": load.model_dump(mode="json"),
        "promises": [asdict(p) for p in promises],
        "replays": [
            {
                "factor": r.factor, "goodput": r.goodput, "wasted_compiles": r.wasted_compiles,
                "faults": r.faults,
                "priorities": {
                    p.name: {
                        **{k: v for k, v in vars(t).items() if k != "waits"},
                        "waits": waits(t), "longest_wait": r.longest_wait[p],
                    } for p, t in r.tallies.items()
                },
                "samples": [
                    {"time": s.time, "depths": s.depths.model_dump(), "capacity": s.capacity,
                     "open_breakers": s.open_breakers} for s in r.samples
                ],
            } for r in replays.values()
        ],
    }


def waits(tally: Tally) -> dict[str, float | None]:
    """Quantiles of the waiting time in seconds; None where nobody was served."""
    found = np.quantile(tally.waits, QUANTILES) if tally.waits else [None] * len(QUANTILES)
    return {f"p{round(100 * q)}": None if v is None else float(v)
            for q, v in zip(QUANTILES, found, strict=True)}


def _minutes(value: float) -> str:
    if value >= 60:
        return f"{value / 60:.3g} h"
    return f"{value:.2g} min" if value >= 1 else f"{value * 60:.2g} s"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _marks(load: Load) -> list[Mark]:
    marks = [
        Mark(o.at_minute / 60, "left",
             f"{o.stage} {'hangs' if o.hangs else 'fails'} for {o.minutes:g} minutes")
        for o in load.outages
    ]
    return marks + [
        Mark(b.at_minute / 60, "born", f"{s.name}: {b.per_hour:g} more an hour, "
             f"for {b.minutes:g} minutes")
        for s in load.arrivals for b in s.bursts
    ]


def _fill(load: Load, result: Replay) -> Markup | None:
    hours = [s.time / 3600 for s in result.samples]
    series = [Series("capacity", hours, [s.capacity for s in result.samples], steps=True)]
    series += [
        Series(f"q-{queue}", hours,
               [getattr(s.depths, queue) / LIMITS[queue] for s in result.samples], steps=True)
        for queue in reversed(list(QUEUE_NAMES))
    ]
    return both(lambda width: line_chart(
        f"how full the queues are at {result.factor:g} times the load", series, width=width,
        marks=_marks(load), y_form=_percent, x_label="hour", from_zero=True))


def _lost(replays: Mapping[float, Replay]) -> Markup | None:
    def share(tally: Tally) -> float | None:
        return (tally.refused + tally.dropped) / tally.arrived if tally.arrived else None

    series = [Series(f"p-{p.name}", list(replays), [share(r.tallies[p]) for r in replays.values()])
              for p in reversed(Priority)]
    return both(lambda width: line_chart(
        "share of arrivals turned away or dropped, by load", series, width=width,
        y_form=_percent, x_label="times the load", from_zero=True, height=220))


def _waiting(result: Replay) -> Markup | None:
    series = []
    for p in reversed(Priority):
        found = result.tallies[p].waits
        if found:
            shares = np.linspace(0, 1, 101)
            # A logarithmic axis has no zero; a second is as good as none.
            minutes = np.maximum(np.quantile(found, shares), 1.0) / 60
            series.append(Series(f"p-{p.name}", [100 * float(s) for s in shares],
                                 [float(m) for m in minutes]))
    return both(lambda width: line_chart(
        f"waiting time by share of items at {result.factor:g} times the load", series,
        width=width, y_form=_minutes, x_label="% of the items wait no longer", height=240))


def _goodput(load: Load, replays: Mapping[float, Replay]) -> Markup | None:
    offered = [sum(t.arrived for t in r.tallies.values()) / load.hours for r in replays.values()]
    series = [Series("control", list(replays), offered),
              Series("grown", list(replays), [r.goodput for r in replays.values()])]
    return both(lambda width: line_chart(
        "goodput by load", series, width=width, x_label="times the load", from_zero=True,
        height=220))


def rows(result: Replay) -> list[dict[str, Any]]:
    """One row per priority, for a table; times as words."""
    def words(seconds: float | None) -> str:
        return "-" if seconds is None or not math.isfinite(seconds) else _minutes(seconds / 60)

    made = []
    for p, t in result.tallies.items():
        if t.arrived:
            found = waits(t)
            made.append({"priority": p.name.lower(), **{k: v for k, v in vars(t).items()
                                                        if k != "waits"},
                         "p50": words(found["p50"]), "p95": words(found["p95"]),
                         "longest": words(max(t.waits, default=None))})
    return made


def _context(
    load: Load, replays: Mapping[float, Replay], promises: Sequence[Promise]
) -> dict[str, Any]:
    shown = [replays[1.0], replays[max(replays)]]
    return {
        "load": load,
        "kept": all(p.kept for p in promises),
        "promises": promises,
        "runs": [{"factor": r.factor, "fill": _fill(load, r), "waiting": _waiting(r),
                  "rows": rows(r), "wasted": r.wasted_compiles, "faults": r.faults}
                 for r in shown],
        "lost": _lost(replays),
        "goodput": _goodput(load, replays),
        "queues": QUEUE_NAMES,
        "limits": LIMITS,
        "priorities": [p.name for p in Priority],
        "has_marks": bool(_marks(load)),
    }
