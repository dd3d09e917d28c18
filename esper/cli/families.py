"""`esper library families`: Karn's report. Which families there are, what they have earned, who is
on offer, how unlike they are, and where the best comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper.cli.library import fits, short
from esper.karn.families import Family, Stock, stocks
from esper.karn.novelty import Bag, bag, novelty
from esper.karn.service import FAMILY_FLOOR, why_silent
from esper.leyline.evidence import Earned
from esper.leyline.library import Library
from esper.nissa.families_page import Branch, FamilyRow, SitePart, write_families


def show_families(
    library: Library, console: Console, signature: str | None, page: Path | None
) -> None:
    """Print the report of every signature that fits, and write it as a page where one is named."""
    found = [s for s in stocks(library) if signature is None or fits(signature, s.signature)]
    for stock in found:
        _print(_part(stock), console)
    if not found:
        console.print("no signature matches", highlight=False)
    if page is not None:
        console.print(write_families([_part(stock) for stock in found], page), highlight=False,
                      soft_wrap=True)


def _part(stock: Stock) -> SitePart:
    offered = stock.offered
    bags = {b.blueprint_id: bag(b.ir) for b in stock.blueprints if b.blueprint_id in offered}
    rows = sorted((_row(f, stock, bags) for f in stock.families),
                  key=lambda r: (-r.earned.mean, -len(r.members)))
    best = stock.best
    alive = sum(bool(f.offered) for f in stock.families)
    said = (f"{len(stock.blueprints)} blueprints in {len(stock.families)} families; {len(offered)} "
            f"on offer, from {alive} families (floor {min(FAMILY_FLOOR, len(stock.families))}); "
            f"{len(stock.untried)} of them untried")
    return SitePart(
        site=str(stock.signature), summary=said, silent=why_silent(stock), families=tuple(rows),
        best=tuple(_name(b.blueprint_id, b.ir.name, stock) for b in
                   (stock.line_of(best) if best is not None else ())))


def _name(blueprint_id: str, name: str, stock: Stock) -> str:
    known = stock.evidence.get(blueprint_id)
    return f"{name or 'unnamed'} {short(blueprint_id)}: {gain(known)}"


def gain(known: Earned | None) -> str:
    """What was earned and what that leaves open, in per cent of the loss."""
    if known is None or known.observed is None:
        return "never in the field"
    noun = "report" if known.reports == 1 else "reports"
    return (f"{known.observed:+.1%} of the loss in {known.reports} {noun}, to expect "
            f"{known.low:+.1%} to {known.high:+.1%}")


def _row(family: Family, stock: Stock, bags: Mapping[str, Bag]) -> FamilyRow:
    """`bags` are those of all that is on offer, by blueprint."""
    ids = {m.blueprint_id for m in family.members}
    others = [b for i, b in bags.items() if i not in ids]
    unlike = [n for i in family.offered if (n := novelty(bags[i], others)) is not None]
    children: dict[str, list[Branch]] = {}
    for m in reversed(family.members):  # the youngest first, so that children are there
        branch = Branch(_name(m.blueprint_id, m.ir.name, stock), m.blueprint_id in family.offered,
                        tuple(reversed(children.get(m.blueprint_id, []))))
        children.setdefault(m.parents[0] if m.parents else "", []).append(branch)
    tops = [b for parent, branches in children.items() if parent not in ids for b in branches]
    return FamilyRow(
        name=family.name, members=tops, size=len(family.members), offered=len(family.offered),
        share=len(family.offered) / len(bags) if bags else 0.0,
        earned=family.earned, novelty=fmean(unlike) if unlike else None)


def _print(part: SitePart, console: Console) -> None:
    console.print(f"\n[bold]{escape(part.site)}[/]  {part.summary}",
                  highlight=False)
    if part.silent:
        console.print(f"Karn is silent: {part.silent}", style="yellow", highlight=False,
                      markup=False)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("family", "members", "on offer", "share", "reports", "mean gain", "to expect",
                    "novelty"):
        table.add_column(heading, no_wrap=True,
                         justify="left" if heading == "family" else "right")
    for row in part.families:
        e = row.earned
        table.add_row(
            row.name, str(row.size), str(row.offered), f"{row.share:.0%}", str(e.reports),
            "-" if e.observed is None else f"{e.observed:+.1%}",
            "-" if e.observed is None else f"{e.low:+.1%} to {e.high:+.1%}",
            "-" if row.novelty is None else f"{row.novelty:.2f}")
    console.print(table)
    _best(part.best, console)


def _best(line: Sequence[str], console: Console) -> None:
    if not line:
        console.print("the best: nothing was reported from the field yet", style="dim",
                      highlight=False)
        return
    console.print("the best, and whom it descends from:", style="dim")
    for depth, each in enumerate(line):
        console.print(f"  {'   ' * depth}{'└─ ' if depth else ''}{each}", highlight=False,
                      markup=False)
