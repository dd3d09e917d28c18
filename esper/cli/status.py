"""`esper status`: queues, capacity, who works on what, and what came of it, on one screen."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.cli.library import age, short, styled_status
from esper.karn.families import stocks
from esper.karn.service import why_silent
from esper.leyline.library import Change, KeptLibrary
from esper.oona.capacity import capacity
from esper.oona.queue import LIMITS

_LOOK_BACK, _SHOWN = 400, 12
_RESULTS = {
    "COMPILED", "INVALID", "VALIDATED", "REJECTED", "QUARANTINED", "RETIRED", "ARCHIVED",
}


def show(library: KeptLibrary, console: Console, where: str) -> None:
    """Print what the library says now; ages are by this machine's clock."""
    depths, now = library.depths(), time.time()
    level = capacity(depths)
    console.print(_headed(where, f"  capacity {level.factor:g} ({level.level}; fullest: "
                          f"{level.queue}, {level.fill:.0%})"))
    queues = _table("queue", "waiting", "limit")
    for name, waiting in depths.model_dump().items():
        queues.add_row(name, str(waiting), str(LIMITS[name]))
    console.print(queues)
    leases = library.leases()
    console.print(_headed("\nat work", f"  {len(leases)}"))
    if leases:
        work = _table("worker", "item", "site", "for", "lease ends in")
        for lease in leases[:_SHOWN]:
            work.add_row(lease.worker, short(lease.item), str(lease.signature),
                         age(lease.since), f"{max(0.0, lease.expires - now):.0f} s")
        console.print(work)
        if len(leases) > _SHOWN:
            console.print(f"and {len(leases) - _SHOWN} more", style="dim")
    for stock in stocks(library):
        if reason := why_silent(stock):
            console.print(f"\nKarn is silent: {reason}", style="yellow", highlight=False,
                          markup=False)
    results = _results(library.changes(limit=_LOOK_BACK))
    console.print(_headed("\nlately", "" if results else "  nothing yet"))
    if results:
        lately = _table("ago", "item", "status", "reason")
        for change in results:
            lately.add_row(age(change.time), short(change.item), styled_status(change.after),
                           (change.reason.splitlines() or ["-"])[0][:80])
        console.print(lately)


def _headed(heading: str, rest: str) -> Text:
    return Text(heading, style="bold").append(rest, style="not bold")


def _results(changes: list[Change]) -> list[Change]:
    """The newest first. COMPILED is a result only where it comes from COMPILING's end."""
    return [c for c in reversed(changes) if c.after in _RESULTS][:_SHOWN]


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "reason",
                         justify="right" if heading in ("waiting", "limit", "ago") else "left")
    return table
