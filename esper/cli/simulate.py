"""`esper simulate`: replay a load against the queue policy, and check what the policy promises."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.config import load_yaml
from esper.nissa.load_report import rows, write_load_report
from esper.oona.load import Load
from esper.oona.promises import check, replay_all
from esper.oona.simulate import Replay

_COLUMNS = {
    "priority": "priority", "arrived": "arrived", "held_back": "held back", "refused": "refused",
    "dropped": "dropped", "dropped_kernels": "kernels aside", "invalid": "invalid",
    "validated": "validated", "left_over": "left over", "p50": "median wait", "p95": "p95",
    "longest": "longest",
}


def _by_priority(result: Replay) -> Table:
    table = Table(title=f"at {result.factor:g} times the load", title_justify="left", box=None,
                  pad_edge=False, header_style="dim", title_style="bold")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="left" if heading == "priority" else "right",
                         no_wrap=True)
    for row in rows(result):
        table.add_row(*(str(row[name]) for name in _COLUMNS))
    return table


def _by_load(replays: Mapping[float, Replay]) -> Table:
    table = Table(title="by load", title_justify="left", box=None, pad_edge=False,
                  header_style="dim", title_style="bold")
    for heading in ("times", "arrived", "refused or dropped", "kernels an hour", "mean capacity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for factor, result in replays.items():
        tallies = result.tallies.values()
        mean = sum(s.capacity for s in result.samples) / len(result.samples)
        table.add_row(
            f"{factor:g}", f"{sum(t.arrived for t in tallies):,}",
            f"{sum(t.refused + t.dropped for t in tallies):,}", f"{result.goodput:.1f}",
            f"{mean:.2f}",
        )
    return table


def run(path: Path, folder: Path) -> int:
    """Replay the load of a file; returns 1 where a promise is broken, else 0.

    Raises:
        ConfigError: the file cannot be used.
    """
    load = load_yaml(path, Load, "examples/load.yaml")
    replays = replay_all(load)
    promises = check(load, replays)
    page, data = write_load_report(folder, load, replays, promises)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for table in (_by_priority(replays[1.0]), _by_priority(replays[max(replays)]),
                  _by_load(replays)):
        console.print(table)
        console.print()
    for promise in promises:
        verdict = ("kept  ", "green") if promise.kept else ("BROKEN", "bold red")
        console.print(Text.assemble(verdict, f" {promise.name}: {promise.evidence}"),
                      soft_wrap=True)
    console.print(f"report: {page}   figures: {data}", markup=False, highlight=False,
                  soft_wrap=True)
    return int(not all(promise.kept for promise in promises))
