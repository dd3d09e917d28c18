"""A page with plots of one benchmark run: `python -m benchmarks.page results.json page.html`.

Read from the JSON of pytest-benchmark. What a benchmark says of itself in `extra_info`:

    ratio, low, high, target   our median over the peer's, its interval, what was aimed at
    contestant                 who was timed, "esper" for ours; others are peers
    limit                      true where it is no peer but a bound, as memory bandwidth is
    size, size_unit            how large the input was; a group with several is drawn as lines

Benchmarks with one `group` and one size are drawn side by side.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
from markupsafe import Markup
from matplotlib import pyplot as plt

OURS, PEER, LIMIT = "#1f5fbf", "#8a8f98", "#c0392b"
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Timed:
    """One benchmark of the run; seconds per call."""

    name: str
    group: str
    contestant: str
    is_limit: bool
    size: float | None
    size_unit: str
    median: float
    low: float
    high: float

    @property
    def colour(self) -> str:
        return LIMIT if self.is_limit else OURS if self.contestant == "esper" else PEER


@dataclass(frozen=True)
class Ratio:
    """Ours over a peer, in one run and in alternation; `target` as written, "<= 1.01" say."""

    name: str
    value: float
    low: float
    high: float
    target: str
    unit: str

    @property
    def met(self) -> bool | None:
        """Whether the value is on the target's side; None where the target is no bound."""
        sign, _, bound = self.target.partition(" ")
        try:
            limit = float(bound.split()[0])
        except (ValueError, IndexError):
            return None
        return {"<=": self.value <= limit, ">=": self.value >= limit}.get(sign)


def read(results: dict[str, Any]) -> tuple[list[Timed], list[Ratio]]:
    """What a results file of pytest-benchmark holds; benchmarks without a group go by name."""
    timed, ratios = [], []
    for bench in results["benchmarks"]:
        info, stats = bench["extra_info"], bench["stats"]
        timed.append(Timed(
            name=bench["name"], group=bench["group"] or bench["fullname"].partition("[")[0],
            contestant=str(info.get("contestant", "esper")), is_limit=bool(info.get("limit")),
            size=info.get("size"), size_unit=str(info.get("size_unit", "")),
            median=stats["median"], low=stats["q1"], high=stats["q3"],
        ))
        if "ratio" in info:
            ratios.append(Ratio(bench["name"], info["ratio"], info["low"], info["high"],
                                str(info.get("target", "")), str(info.get("unit", ""))))
    return timed, ratios


def _drawn(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg"):]


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bars(group: Iterable[Timed]) -> str:
    """Median times side by side, fastest first, quartiles as whiskers; limits are lines."""
    rows = sorted(group, key=lambda t: t.median, reverse=True)
    shown, limits = [r for r in rows if not r.is_limit], [r for r in rows if r.is_limit]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * max(1, len(shown))))
    names = [f"{r.contestant}" if r.contestant != "esper" else r.name for r in shown]
    axes.barh(range(len(shown)), [r.median for r in shown], color=[r.colour for r in shown],
              xerr=([r.median - r.low for r in shown], [r.high - r.median for r in shown]),
              error_kw={"elinewidth": 1, "ecolor": "#333"})
    axes.set_yticks(range(len(shown)), names)
    for place, row in enumerate(shown):
        axes.annotate(f" {_time(row.median)}", (row.high, place), va="center", fontsize=8)
    for row in limits:
        axes.axvline(row.median, color=LIMIT, linestyle="--", linewidth=1)
        axes.annotate(f" {row.contestant}: {_time(row.median)}", (row.median, -0.5), fontsize=8,
                      color=LIMIT)
    axes.xaxis.set_major_formatter(lambda value, _: _time(value) if value > 0 else "0")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def lines(group: Iterable[Timed]) -> str:
    """Time by size, both axes logarithmic, one line per contestant."""
    by_contestant: dict[str, list[Timed]] = defaultdict(list)
    for row in group:
        if row.size:
            by_contestant[row.contestant].append(row)
    figure, axes = plt.subplots(figsize=(8, 4.2))
    unit = ""
    for contestant, rows in sorted(by_contestant.items(), key=lambda item: item[0] != "esper"):
        rows.sort(key=lambda r: r.size or 0.0)
        unit = rows[0].size_unit
        style = {"color": OURS, "linewidth": 2.2} if contestant == "esper" else {"linewidth": 1.2}
        dash = "--" if rows[0].is_limit else "-"
        axes.plot([r.size for r in rows], [r.median for r in rows], dash, marker="o",
                  markersize=3, label=contestant, **style)
    axes.set(xscale="log", yscale="log", xlabel=unit)
    axes.yaxis.set_major_formatter(lambda value, _: _time(value))
    axes.grid(alpha=0.25, which="major")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def write_page(results: dict[str, Any], target: Path) -> None:
    """Draw `results`, the parsed JSON of pytest-benchmark, into an HTML file for offline use."""
    timed, ratios = read(results)
    groups: dict[str, list[Timed]] = defaultdict(list)
    for row in timed:
        groups[row.group].append(row)
    charts = []
    for name, rows in sorted(groups.items()):
        sized = len({r.size for r in rows if r.size is not None}) > 1
        if sized or len(rows) > 1:
            charts.append((name, lines(rows) if sized else bars(rows)))
    machine = results["machine_info"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text())
    alone = [r for rows in groups.values() if len(rows) == 1 for r in rows]
    target.write_text(template.render(
        ratios=ratios, charts=[(name, Markup(svg)) for name, svg in charts],
        alone=[(r.name, _time(r.median), _time(r.low), _time(r.high)) for r in alone],
        date=results["datetime"],
        machine=f"{machine['cpu'].get('brand_raw', machine['machine'])}, "
                f"{machine['cpu'].get('count', '?')} processors, Python "
                f"{machine['python_version']}",
    ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    write_page(json.loads(options.results.read_text()), options.page)
    print(options.page)


if __name__ == "__main__":
    main()
