"""Karn's report as a page: families, what they have earned, and the tree of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markupsafe import Markup

from esper.leyline.evidence import Earned
from esper.nissa.page import write_page


@dataclass(frozen=True)
class Branch:
    """One blueprint in words, whether it is on offer, and what descends from it."""

    said: str
    offered: bool
    children: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class FamilyRow:
    """A family: `members` are the tops of its tree, `share` that of all offers, `novelty` the mean
    distance of what it offers to the nearest of other families' (0 to 1), None where there is
    nothing to compare."""

    name: str
    members: Sequence[Branch]
    size: int
    offered: int
    share: float
    earned: Earned
    novelty: float | None


@dataclass(frozen=True)
class SitePart:
    """All that is said of one signature; `best` is a line of descent, the founder first."""

    site: str
    summary: str
    silent: str
    families: tuple[FamilyRow, ...]
    best: tuple[str, ...]


def _interval(earned: Earned, limit: float) -> Markup:
    """What is to be expected, on an axis from -limit to +limit with a tick at zero."""
    width, height = 180.0, 16.0

    def x(value: float) -> float:
        return width / 2 * (1 + max(-1.0, min(1.0, value / limit)))

    title = escape(f"{earned.mean:+.1%}, {earned.low:+.1%} to {earned.high:+.1%}")
    return Markup(
        f'<svg class="interval" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<line class="zero" x1="{width / 2:g}" x2="{width / 2:g}" y1="1" y2="{height - 1:g}"/>'
        f'<line class="span" x1="{x(earned.low):.1f}" x2="{x(earned.high):.1f}" '
        f'y1="{height / 2:g}" y2="{height / 2:g}"/>'
        f'<circle class="point" cx="{x(earned.mean):.1f}" cy="{height / 2:g}" r="3.5"/></svg>')


def write_families(sites: Sequence[SitePart], target: Path) -> Path:
    """Write the page and return its path."""
    parts = []
    for site in sites:
        reported = [f.earned for f in site.families if f.earned.reports]
        limit = max((abs(v) for e in reported for v in (e.low, e.high)), default=1.0) * 1.05
        parts.append({"site": site, "limit": limit, "rows": [
            (f, _interval(f.earned, limit) if f.earned.reports else None)
            for f in site.families]})
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_page("families.html.j2", {
        "parts": parts, "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}, target)
