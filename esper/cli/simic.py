"""`esper simic train` and `status`: the policy that learns from field reports, and its versions."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from esper.cli.library import age
from esper.simic.experience import Experience, experience_in
from esper.simic.promote import too_few, train
from esper.simic.versions import Version, Versions
from esper.urza.library import LocalLibrary


def train_policy(library: LocalLibrary, console: Console) -> None:
    """Train, judge, keep and perhaps promote; says what came of it.

    Raises:
        LibraryError: versions cannot be read or written.
    """
    experience, versions = experience_in(library), Versions(library.root)
    _told(experience, console)
    console.print(train(experience, versions).said, highlight=False, markup=False)


def status(library: LocalLibrary, console: Console) -> None:
    """Print what there is to learn from, and every version with its figures."""
    experience, versions = experience_in(library), Versions(library.root)
    _told(experience, console)
    if lacking := too_few(experience.part(held=False), experience.part(held=True)):
        console.print(lacking, style="yellow", highlight=False, markup=False)
    known, in_use = versions.all(), versions.promoted()
    if in_use is None:
        console.print("no version is promoted: policy {kind: bandit} falls back to the heuristic",
                      highlight=False, markup=False)
    if known:
        console.print(_table(known, in_use))


def _told(experience: Experience, console: Console) -> None:
    learning, held = experience.part(held=False), experience.part(held=True)
    silent = f"; {experience.silent} more say nothing of a worth" if experience.silent else ""
    console.print(
        f"{len(learning)} reports of {learning.run_count} runs to train on, {len(held)} of "
        f"{held.run_count} runs held out{silent}", highlight=False)


def _table(versions: list[Version], in_use: Version | None) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("version", "", "age", "trained on", "against", "error", "rank",
                    "squared error saved", "held out"):
        table.add_column(heading, no_wrap=heading in ("version", "", "age"))
    for v in reversed(versions):
        d = v.verdict
        table.add_row(
            v.name, "in use" if in_use is not None and v.number == in_use.number
            else "promoted" if v.promoted else "not promoted", age(v.time),
            f"{v.reports} reports, {v.runs} runs", d.rival,
            f"{d.new.error:.3f}, was {d.old.error:.3f}",
            f"{_rank(d.new.rank)}, was {_rank(d.old.rank)}",
            f"{d.better:+.1%} ({d.low:+.1%} to {d.high:+.1%})",
            f"{d.reports} reports, {d.runs} runs")
    return table


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
