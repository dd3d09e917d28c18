"""What a run says, in words and rows: the facts under the report's pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from esper.leyline.command import Action, Command, FieldReport, Transition
from esper.leyline.events import Event, Topic
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, SeedState
from esper.leyline.verdict import Measurement, Tag
from esper.nissa.charts import Band, duration, short_number
from esper.nissa.metrics import EpochRow, Run

LEFT_STATES = (SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK)
SMALL_LOSS_CHANGE = 0.01


@dataclass(frozen=True)
class Headline:
    """One sentence, whether it is good news ("good", "bad", "even" or "open"), and notes."""

    sentence: str
    mood: str
    notes: tuple[str, ...] = ()


def transitions(run: Run) -> list[Transition]:
    return [r.payload for r in run.audit if isinstance(r.payload, Transition)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.2f} times" if before else "from nothing"


def headline(run: Run) -> Headline:
    """What growth bought, whichever way it came out, with figures of the last epoch."""
    moves = transitions(run)
    kept = sum(t.after is SeedState.FOSSILIZED for t in moves)
    born = sum(t.after is SeedState.GERMINATED for t in moves)
    grown = run.summary.grown.last if run.summary is not None else None
    control = (
        run.summary.control.last
        if run.summary is not None and run.summary.control is not None else None
    )
    if grown is None:
        if not run.epochs:
            return Headline("No epoch of this run was completed; there is nothing to judge.",
                            "open")
        return Headline(
            f"This run has not reached its end: {_state_of(run.epochs[-1])} after epoch "
            f"{run.epochs[-1].epoch}.", "open")
    noun = "seed was" if born == 1 else "seeds were"
    seeds = f"{born} {noun} tried, {kept} kept" if born else "no seed was tried"
    if control is None:
        why = run.summary.no_control if run.summary is not None else ""
        return Headline(
            f"What growth bought is not known, for nothing was trained beside it"
            f"{f' ({why})' if why else ''}: {_state_of(grown)}; {seeds}.", "open")
    if kept == 0:
        return Headline(
            f"Nothing grew: {seeds}. It ended at {_state_of(grown)}, the host alone at "
            f"{_state_of(control)}.", "even", _caveats(run, grown, control))
    sentence, mood = _compare(run, grown, control)
    return Headline(f"{sentence} {seeds[:1].upper()}{seeds[1:]}.", mood,
                    _caveats(run, grown, control))


def _state_of(row: EpochRow) -> str:
    accuracy = "" if row.eval_accuracy is None else f"accuracy {_percent(row.eval_accuracy)}, "
    return f"{accuracy}loss {row.eval_loss:.4g}"


def _compare(run: Run, grown: EpochRow, control: EpochRow) -> tuple[str, str]:
    a, b = grown.eval_accuracy, control.eval_accuracy
    change = grown.eval_loss - control.eval_loss
    if not math.isfinite(change):
        return (f"One of the two trainings diverged: loss {grown.eval_loss:.4g} with growth, "
                f"{control.eval_loss:.4g} without.", "bad" if not math.isfinite(grown.eval_loss)
                else "good")
    share = change / control.eval_loss if control.eval_loss else 0.0
    by = f"{100 * share:+.0f}\N{NO-BREAK SPACE}%"
    loss = f"the loss from {control.eval_loss:.4g} to {grown.eval_loss:.4g} ({by})"
    if run.info.primary == "loss" or a is None or b is None:
        if abs(share) < SMALL_LOSS_CHANGE:
            return f"Growth made next to no difference: it moved {loss}.", "even"
        return ((f"Growth lowered {loss}.", "good") if change < 0
                else (f"Growth did not pay: it raised {loss}.", "bad"))
    points = 100 * (a - b)
    moved = f"from {_percent(b)} to {_percent(a)} ({points:+.1f}\N{NO-BREAK SPACE}points)"
    verb = "lowered" if change < 0 else "raised"
    n = run.info.eval_samples
    if n and abs(a - b) < 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / n):
        return (f"Growth made no difference that {n:,} evaluation samples can show: accuracy "
                f"went {moved}, and {loss.replace('the loss', 'the loss went', 1)}.", "even")
    if points > 0:
        return f"Growth raised accuracy {moved} and {verb} {loss}.", "good"
    if points < 0:
        return f"Growth did not pay: accuracy fell {moved}; it {verb} {loss}.", "bad"
    return f"Growth left accuracy at {_percent(a)} and {verb} {loss}.", "even"


def _caveats(run: Run, grown: EpochRow, control: EpochRow) -> tuple[str, ...]:
    notes = ["One seed on one data set is one draw, not a law."]
    if run.summary is None or run.summary.control is None:
        return tuple(notes)
    per_epoch = run.info.samples_per_epoch
    spent = run.summary.grown.training_flops(per_epoch)
    alone = run.summary.control.training_flops(per_epoch)
    if spent is not None and alone and abs(spent / alone - 1) > 0.005:
        notes.append(
            f"The host alone had the same epochs, not the same compute: training took "
            f"{short_number(spent)}FLOP with growth and {short_number(alone)}FLOP without "
            f"({_ratio(spent, alone)}).")
    return tuple(notes)


@dataclass(frozen=True)
class Figure:
    """A number to be read at a glance, the host alone's beside it where there is one."""

    name: str
    value: str
    beside: str = ""


def figures(run: Run) -> list[Figure]:
    """The last epoch's numbers, with growth and without; absent ones are left out."""
    last = run.summary.grown.last if run.summary is not None else None
    last = last or (run.epochs[-1] if run.epochs else None)
    if last is None:
        return []
    control = (run.summary.control.last
               if run.summary is not None and run.summary.control is not None else None)
    forms = (
        ("accuracy", "eval_accuracy", _percent),
        (run.info.metric, "eval_loss", lambda v: f"{v:.4g}"),
        ("parameters", "parameters", lambda v: f"{v:,}"),
        ("FLOPs per sample", "flops_per_sample", short_number),
        ("wall time", "seconds", _clock),
    )
    result = []
    for name, attribute, form in forms:
        value = getattr(last, attribute)
        if value is None:
            continue
        other = getattr(control, attribute) if control is not None else None
        result.append(Figure(name, form(value), "" if other is None else f"{form(other)} alone"))
    result += [Figure(f"{b.name} budget", b.of) for b in last.budgets]
    if run.steps is not None and len(run.steps):
        p50, p99 = (duration(float(v)) for v in np.percentile(run.steps, (50, 99)))
        result.append(Figure("step time, median", p50, f"p99 {p99}"))
    return result


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


# -- seeds --------------------------------------------------------------------------------


def bands(run: Run) -> list[tuple[str, list[Band]]]:
    """The state of every site over steps. A site that never moved is DORMANT throughout."""
    moves = transitions(run)
    last = max([t.step for t in moves] + [row.step for row in run.epochs[-1:]], default=0)
    rows = []
    for site in dict.fromkeys([*run.info.sites, *(t.site for t in moves)]):
        at, state, trigger, row = 0, SeedState.DORMANT, "", []
        for t in [t for t in moves if t.site == site]:
            row.append(_band(at, t.step, state, trigger))
            at, state, trigger = t.step, t.after, t.trigger
        row.append(_band(at, last, state, trigger))
        rows.append((site, [b for b in row if b.end > b.start or b.css != "s-DORMANT"]))
    return rows


def _band(start: int, end: int, state: SeedState, trigger: str) -> Band:
    why = f": {trigger}" if trigger else ""
    return Band(start, end, f"s-{state}", f"{state}, steps {start:,} to {end:,}{why}")


# -- kernels ------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelRow:
    """One line of the kernel table; None and empty mean not there."""

    name: str
    identifier: str
    site: str
    pipeline: str
    verdict: str
    css: str
    reason: str
    speedup: float | None = None
    measurements: tuple[Measurement, ...] = ()
    tags: tuple[Tag, ...] = ()
    fate: tuple[str, ...] = field(default=())


def kernel_rows(run: Run) -> list[KernelRow]:
    """Kernels the run used first, then accepted ones by speed, then the refused."""
    if run.book is None:
        return []
    fates = _fates(run)
    names = {b.blueprint_id: b.ir.name for b in run.book.blueprints}
    rows = []
    for k in run.book.kernels:
        accepted = k.status is KernelStatus.VALIDATED
        refused = k.status in (KernelStatus.REJECTED, KernelStatus.QUARANTINED)
        rows.append(KernelRow(
            name=names.get(k.blueprint_id) or k.blueprint_id[:14],
            identifier=k.kernel_id, site=str(k.manifest.signature),
            pipeline=k.manifest.pipeline, verdict=str(k.status).lower().replace("_", " "),
            css="good" if accepted else "bad" if refused else "",
            reason=k.reason or _report_reason(k),
            speedup=k.report.speedup if k.report is not None else None,
            measurements=k.report.measurements if k.report is not None else (),
            tags=k.report.tags if k.report is not None else (),
            fate=tuple(fates.get(k.kernel_id, ())),
        ))
    rows.sort(key=lambda r: (not r.fate, r.css != "good", -(r.speedup or 0.0), r.name))
    rows += [
        KernelRow(name=b.ir.name or b.blueprint_id[:14], identifier=b.blueprint_id,
                  site=str(b.signature), pipeline="", verdict="invalid blueprint", css="bad",
                  reason=b.reason)
        for b in run.book.blueprints if b.status is BlueprintStatus.INVALID
    ]
    return rows


def _report_reason(k: KernelRecord) -> str:
    return k.report.reason if k.report is not None else ""


def _fates(run: Run) -> dict[str, list[str]]:
    """What became of each kernel in this run, by kernel id: one line per seed."""
    gains = {r.payload.trace_id: r.payload.gain for r in run.audit
             if isinstance(r.payload, FieldReport) and r.payload.gain is not None}
    ends: dict[str, Transition] = {}
    for t in transitions(run):
        if t.kernel_id is not None and t.after is not SeedState.DORMANT:
            ends[t.trace_id] = t
    fates: dict[str, list[str]] = {}
    for trace, t in ends.items():
        state = "kept" if t.after is SeedState.FOSSILIZED else str(t.after).lower()
        gain = f", gain {gains[trace]:+.3g}" if trace in gains else ""
        fates.setdefault(t.kernel_id or "", []).append(
            f"{state.replace('_', ' ')} at {t.site}{gain}")
    return fates


# -- the trail ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrailRow:
    """One line of the audit table."""

    epoch: int | None
    step: int | None
    site: str
    trigger: str
    outcome: str
    css: str
    kernel: str = ""
    trace: str = ""


def trail(run: Run) -> list[TrailRow]:
    """Trigger and transition, oldest first; rollbacks, warnings, and commands nothing came of."""
    done = {(t.trace_id, t.trigger) for t in transitions(run)}
    rows: list[TrailRow] = []
    for record in run.audit:
        match record.payload:
            case Transition() as t:
                rows.append(TrailRow(
                    t.epoch, t.step, t.site, t.trigger, f"{t.before} → {t.after}",
                    f"s-{t.after}", (t.kernel_id or "")[:14], t.trace_id))
            case Command() as c if (c.trace_id, c.reason) not in done:
                what = "germination" if c.action is Action.GERMINATE else c.action
                rows.append(TrailRow(None, None, c.site, c.reason, f"{what} was not carried out",
                                     "s-CANCELLED", (c.kernel_id or "")[:14], c.trace_id))
            case Event(topic=Topic.ROLLBACK) as e:
                step = e.body.get("step")
                rows.append(TrailRow(None, step if isinstance(step, int) else None, "whole run",
                                     str(e.body.get("reason", "")), "rolled back",
                                     "s-ROLLED_BACK", trace=e.trace_id))
            case Event(body={"warning": str(why)}) as e:
                rows.append(TrailRow(None, None, "whole run", why, "warning", "", trace=e.trace_id))
    return rows


def states_seen(run: Run) -> Iterable[SeedState]:
    """The states that occur, in the order of the life of a seed."""
    seen = {SeedState.DORMANT, *(t.after for t in transitions(run))}
    return [s for s in SeedState if s in seen]
