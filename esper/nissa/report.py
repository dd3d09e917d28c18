"""The report of a run: one HTML file that needs nothing else, now or in ten years."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from markupsafe import Markup

from esper.leyline.lifecycle import SeedState
from esper.nissa import charts, findings
from esper.nissa.charts import Mark, Series
from esper.nissa.metrics import EpochRow, Run, read_run
from esper.nissa.page import both, write_page

_MARKED: Mapping[SeedState, str] = {
    SeedState.GERMINATED: "born",
    SeedState.FOSSILIZED: "kept",
    SeedState.CULLED: "left",
    SeedState.CANCELLED: "left",
    SeedState.ROLLED_BACK: "left",
}


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises:
        ContractError: it is not a run folder, or a file in it is damaged.
    """
    run = read_run(run_folder)
    return write_page("report.html.j2", _context(run), run.folder / "report.html")


def headline(run_folder: str | Path) -> str:
    """The report's first sentence: what growth bought, with figures.

    Raises:
        ContractError: as `write_report`.
    """
    return findings.headline(read_run(run_folder)).sentence.replace("\N{NO-BREAK SPACE}", " ")


def _arms(run: Run) -> tuple[tuple[EpochRow, ...], tuple[EpochRow, ...]]:
    if run.summary is None:
        return run.epochs, ()
    control = run.summary.control.epochs if run.summary.control is not None else ()
    return run.summary.grown.epochs or run.epochs, control


def _epoch_at(rows: tuple[EpochRow, ...], step: int) -> float:
    """Where a step lies on the axis of epochs."""
    steps, epochs = [0, *(r.step for r in rows)], [0, *(r.epoch for r in rows)]
    return float(np.interp(step, steps, epochs))


def _marks(run: Run, rows: tuple[EpochRow, ...]) -> list[Mark]:
    return [
        Mark(_epoch_at(rows, t.step), _MARKED[t.after],
             f"{t.site}: {t.after} at step {t.step:,}. {t.trigger}")
        for t in findings.transitions(run) if t.after in _MARKED
    ]


def _accuracy_floor(run: Run) -> float | None:
    """Where the axis of accuracy starts: what both arms had passed after a tenth of the run.

    The climb of the first epochs would leave a few pixels to the difference that matters.
    """
    late = [r.eval_accuracy for rows in _arms(run) for r in rows[len(rows) // 10:]
            if r.eval_accuracy is not None]
    early = [r.eval_accuracy for rows in _arms(run) for r in rows if r.eval_accuracy is not None]
    if not late or max(late) - min(early) < 1.5 * (max(late) - min(late)):
        return None
    return min(late)


def _curve(run: Run, attribute: str, label: str, **style: Any) -> Markup | None:
    grown, control = _arms(run)
    steps, with_train = style.pop("steps", False), style.pop("with_train", False)
    series = []
    if with_train:
        series.append(Series("train", [r.epoch for r in grown], [r.train_loss for r in grown]))
    for css, rows in (("control", control), ("grown", grown)):
        series.append(Series(css, [r.epoch for r in rows],
                             [getattr(r, attribute) for r in rows], steps))
    marks = _marks(run, grown)
    if all(v is None for s in series for v in s.ys):
        return None
    return both(lambda width: charts.line_chart(label, series, width=width, marks=marks, **style))


def _beside_growth(
    steps: npt.NDArray[np.float64], growth: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The steps next to a transition: the one that ended there and the one that followed."""
    beside = np.unique(np.concatenate([growth - 1, growth]))
    return beside[(beside >= 0) & (beside < len(steps))]


def _steps(run: Run) -> tuple[Markup | None, str]:
    steps, growth = run.steps, run.growth_steps
    if steps is None or not len(steps):
        return None, ""
    beside = np.zeros(0, dtype=np.int64) if growth is None else _beside_growth(steps, growth)
    special = steps[beside]
    chart = both(lambda width: charts.step_histogram(
        "distribution of step times", steps, special, width=width))
    p50, p99 = np.percentile(steps, (50, 99))
    said = (f"{len(steps):,} steps; median {charts.duration(float(p50))}, p99 "
            f"{charts.duration(float(p99))}, longest {charts.duration(float(np.max(steps)))}.")
    if len(special):
        plain = np.delete(steps, beside)
        said += (f" {len(special)} of them lie beside a transition: the longest took "
                 f"{charts.duration(float(np.max(special)))}")
        if len(plain):
            said += f", {float(np.max(special) / np.median(plain)):.1f} times a median plain step"
        said += "."
    return chart, said


def _kernels(run: Run) -> list[dict[str, Any]]:
    rows = findings.kernel_rows(run)
    extremes = [v for r in rows for m in r.measurements for v in (m.low, m.high) if v > 0]
    limit = max([1.5, *(max(v, 1 / v) for v in extremes)]) * 1.05
    return [
        {"row": row, "measured": [
            (m, Markup(charts.interval(m.speedup, m.low, m.high, limit)))
            for m in row.measurements]}
        for row in rows
    ]


def _environment(run: Run) -> list[tuple[str, str]]:
    info, hardware = run.info, run.info.hardware
    facts = [("run", info.run_id), ("seed", str(info.seed)),
             ("started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(info.started)))]
    if hardware is not None:
        facts += [("processor", hardware.cpu), ("instruction set", hardware.isa),
                  ("threads", f"{hardware.threads} of {hardware.cores} cores")]
    return facts + sorted(info.versions.items())


def _context(run: Run) -> dict[str, Any]:
    rows = findings.bands(run)
    last = max((b.end for _, row in rows for b in row), default=0.0)
    step_chart, step_words = _steps(run)
    notes = list(run.notes)
    if run.summary is not None and run.summary.audit_lost:
        notes.append(f"{run.summary.audit_lost} audit records could not be written")
    grown, control = _arms(run)
    floor = _accuracy_floor(run)
    return {
        "info": run.info,
        "headline": findings.headline(run),
        "figures": findings.figures(run),
        "notes": notes,
        "has_control": bool(control),
        "has_train": any(r.train_loss is not None for r in grown),
        "has_marks": bool(findings.transitions(run)),
        "accuracy": _curve(run, "eval_accuracy", "accuracy by epoch",
                           y_form=lambda v: f"{100 * v:.3g} %", floor=floor),
        "accuracy_floor": None if floor is None else f"{100 * floor:.0f} %",
        "loss": _curve(run, "eval_loss", "loss by epoch", with_train=True),
        "parameters": _curve(run, "parameters", "parameters by epoch", steps=True,
                             from_zero=True, height=170),
        "flops": _curve(run, "flops_per_sample", "FLOPs per sample by epoch", steps=True,
                        from_zero=True, height=170),
        "timeline": both(lambda width: charts.timeline(
            "state of every site over steps", rows, last=last, width=width)) if rows else None,
        "states": findings.states_seen(run),
        "kernels": _kernels(run),
        "steps": step_chart,
        "step_words": step_words,
        "trail": findings.trail(run),
        "environment": _environment(run),
        "config": yaml.safe_dump(run.info.config, sort_keys=False) if run.info.config else "",
    }
