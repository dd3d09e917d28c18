"""A page with plots of one benchmark run: `python -m benchmarks.page results.json page.html`.

Read from the JSON of pytest-benchmark. What a benchmark says of itself in `extra_info`:

    ratio, low, high, target   our median over the peer's, its interval, what was aimed at
    contestant                 who was timed, "esper" for ours; others are peers
    limit                      true where it is no peer but a bound, as memory bandwidth is
    size, size_unit            how large the input was; a group with several is drawn as lines
    calls                      how many calls a timed round makes, where it is a loop; one if not
    untimed                    true where the timed function is the measuring itself, so that its
                               time is nobody's; what was found is then in the next two
    series                     {group: {"size_unit": unit, "limits": [contestant, ...],
                               "lines": {contestant: [[size, seconds], ...]}}}: medians per call
                               of several contestants; size is null where there is but one
    speedups                   {group: {label: [times as fast, low, high]}}: ours beside one peer,
                               with its interval, or with null for both where it has none
    traces                     {group: {contestant: {"seconds": [of every step], "marks": [number of
                               a step, ...]}}}: whole runs, step by step

Benchmarks with one `group` and one size are drawn side by side. Groups of one name are one plot,
whichever benchmarks they come from. A contestant whose name begins with "esper" is ours too.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jinja2
import matplotlib

matplotlib.use("svg")
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

OURS, PEER, LIMIT = "#1f5fbf", "#8a8f98", "#c0392b"
BLUES = (OURS, "#6fa3e8", "#0d2f66", "#4f7f9f")
PEERS = ("#e08a1e", "#3b8f4b", "#8e5ea2", "#8a8f98", "#a8763e", "#c2528b")
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
    def is_ours(self) -> bool:
        return self.contestant.startswith("esper")

    @property
    def colour(self) -> str:
        return LIMIT if self.is_limit else OURS if self.is_ours else PEER


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


Speedups = dict[str, tuple[float, float, float]]
"""By label: times as fast as the peer, and its interval; NaN where there is none."""


@dataclass(frozen=True)
class Trace:
    """A run, step by step; something happened before each of the steps in `marks`."""

    contestant: str
    seconds: list[float]
    marks: list[int]


class Results(NamedTuple):
    timed: list[Timed]
    ratios: list[Ratio]
    speedups: dict[str, Speedups]
    traces: dict[str, list[Trace]]


def read(results: dict[str, Any]) -> Results:
    """What a results file of pytest-benchmark holds; benchmarks without a group go by name."""
    timed: list[Timed] = []
    ratios: list[Ratio] = []
    speedups: dict[str, Speedups] = defaultdict(dict)
    traces: dict[str, list[Trace]] = defaultdict(list)
    for bench in results["benchmarks"]:
        info, stats = bench["extra_info"], bench["stats"]
        if not info.get("untimed"):
            calls = info.get("calls", 1)
            timed.append(Timed(
                name=bench["name"], group=bench["group"] or bench["fullname"].partition("[")[0],
                contestant=str(info.get("contestant", "esper")), is_limit=bool(info.get("limit")),
                size=info.get("size"), size_unit=str(info.get("size_unit", "")),
                median=stats["median"] / calls, low=stats["q1"] / calls, high=stats["q3"] / calls,
            ))
        for group, plot in info.get("series", {}).items():
            timed += [
                Timed(bench["name"], group, contestant, contestant in plot.get("limits", ()), size,
                      plot["size_unit"], seconds, seconds, seconds)
                for contestant, points in plot["lines"].items() for size, seconds in points
            ]
        for group, found in info.get("speedups", {}).items():
            speedups[group] |= {
                label: (value, *(math.nan if end is None else end for end in interval))
                for label, (value, *interval) in found.items()
            }
        for group, runs in info.get("traces", {}).items():
            traces[group] += [Trace(contestant, **run) for contestant, run in runs.items()]
        if "ratio" in info:
            ratios.append(Ratio(bench["name"], info["ratio"], info["low"], info["high"],
                                str(info.get("target", "")), str(info.get("unit", ""))))
    return Results(timed, ratios, dict(speedups), dict(traces))


def _drawn(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg"):]


def _time(seconds: float) -> str:
    if seconds < 0:
        return f"-{_time(-seconds)}"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bars(group: Iterable[Timed]) -> str:
    """Median times side by side, fastest first, quartiles as whiskers; limits are lines."""
    rows = sorted(group, key=lambda t: t.median, reverse=True)
    shown, limits = [r for r in rows if not r.is_limit], [r for r in rows if r.is_limit]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * max(1, len(shown))))
    names = [r.contestant if r.contestant != "esper" else r.name for r in shown]
    axes.barh(range(len(shown)), [r.median for r in shown], color=[r.colour for r in shown],
              xerr=([r.median - r.low for r in shown], [r.high - r.median for r in shown]),
              error_kw={"elinewidth": 1, "ecolor": "#333"})
    axes.set_yticks(range(len(shown)), names)
    for place, row in enumerate(shown):
        axes.annotate(f" {_time(row.median)}", (row.high, place), va="center", fontsize=8)
    for row in limits:
        axes.axvline(row.median, color=LIMIT, linestyle="--", linewidth=1)
        axes.annotate(f" {row.contestant}: {_time(row.median)}", (row.median, 1.0), fontsize=8,
                      xycoords=("data", "axes fraction"), va="bottom", color=LIMIT)
    axes.xaxis.set_major_formatter(lambda value, _: _time(value) if value else "0")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def lines(group: Iterable[Timed]) -> str:
    """Time by size, both axes logarithmic, one line per contestant.

    What is not above zero, as an overhead that drowned in the noise, has no place on such an axis:
    the legend says it instead.
    """
    by_contestant: dict[str, list[Timed]] = defaultdict(list)
    for row in group:
        if row.size:
            by_contestant[row.contestant].append(row)
    figure, axes = plt.subplots(figsize=(8, 4.2))
    unit = ""
    blues, others = iter(BLUES * len(by_contestant)), iter(PEERS * len(by_contestant))
    for contestant, rows in sorted(by_contestant.items(),
                                   key=lambda item: not item[0].startswith("esper")):
        rows.sort(key=lambda r: r.size or 0.0)
        unit = rows[0].size_unit
        if rows[0].is_limit:
            colour, width, dash = LIMIT, 1.2, "--"
        else:
            colour, width, dash = (
                (next(blues), 2.2, "-") if rows[0].is_ours else (next(others), 1.2, "-"))
        above, below = [r for r in rows if r.median > 0], [r for r in rows if r.median <= 0]
        label = contestant + (
            f" (at {', '.join(f'{r.size:g}: {_time(r.median)}' for r in below)})" if below else "")
        axes.plot([r.size for r in above], [r.median for r in above], dash, marker="o",
                  markersize=3, label=label, color=colour, linewidth=width)
    axes.set(xscale="log", yscale="log", xlabel=unit)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=30))
    axes.yaxis.set_major_formatter(lambda value, _: _time(value))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="major")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def speedup_bars(found: Speedups) -> str:
    """Times as fast as the peer, with intervals as whiskers; the line is the peer."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.34 * len(found)))
    rows = list(reversed(found.items()))
    values = [value for _, (value, _, _) in rows]
    axes.barh(range(len(rows)), values, color=OURS,
              xerr=([max(value - low, 0.0) for _, (value, low, _) in rows],
                    [max(high - value, 0.0) for _, (value, _, high) in rows]),
              error_kw={"elinewidth": 1, "ecolor": "#333"})
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    for place, (_, (value, _, high)) in enumerate(rows):
        axes.annotate(f" {value:.2f}", (value if math.isnan(high) else high, place), va="center",
                      fontsize=8)
    axes.axvline(1.0, color="#333", linestyle="--", linewidth=1)
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast")
    axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def step_times(runs: Iterable[Trace]) -> str:
    """Time of every step, runs one over the other on the same axes; dotted lines are the marks."""
    rows = list(runs)
    figure, all_axes = plt.subplots(len(rows), figsize=(8, 1.9 * len(rows)), squeeze=False,
                                    sharex=True, sharey=True)
    for axes, run in zip(all_axes[:, 0], rows, strict=True):
        colour = OURS if run.contestant.startswith("esper") else PEERS[0]
        for mark in run.marks:
            axes.axvline(mark, color="#bbb", linewidth=0.8, linestyle=":")
        axes.plot(run.seconds, color=colour, linewidth=1, marker=".", markersize=3)
        axes.set_title(f"{run.contestant}: longest {_time(max(run.seconds))}, median "
                       f"{_time(median(run.seconds))}", fontsize=9, loc="left")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: _time(value))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    return _drawn(figure)


def write_page(results: dict[str, Any], target: Path) -> None:
    """Draw `results`, the parsed JSON of pytest-benchmark, into an HTML file for offline use."""
    timed, ratios, speedups, traces = read(results)
    groups: dict[str, list[Timed]] = defaultdict(list)
    for row in timed:
        groups[row.group].append(row)
    charts = []
    for name, rows in sorted(groups.items()):
        sized = len({r.size for r in rows if r.size is not None}) > 1
        if sized or len(rows) > 1:
            charts.append((name, lines(rows) if sized else bars(rows)))
    charts += [(name, speedup_bars(found)) for name, found in sorted(speedups.items())]
    charts += [(name, step_times(runs)) for name, runs in sorted(traces.items())]
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
