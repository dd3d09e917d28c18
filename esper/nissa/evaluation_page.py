"""The page of an evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from esper.nissa import evaluation_charts as draw
from esper.nissa.charts import short_number
from esper.nissa.page import both, write_page

Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]
_MOMENTS = {"TRAINING": ("born", "begins"), "FOSSILIZED": ("kept", "kept"),
            "CULLED": ("left", "culled"), "CANCELLED": ("left", "cancelled"),
            "ROLLED_BACK": ("left", "rolled back")}


def write_evaluation_page(target: Path, figures: Mapping[str, Any], runs: Runs) -> Path:
    """Write the page of `results.json` and the runs it was made of, by arm and seed."""
    ended = {arm: {s: r for s, r in by_seed.items() if r["failure"] is None}
             for arm, by_seed in runs.items()}
    return write_page("evaluation.html.j2", {
        "f": figures, "headline": headline(figures),
        "arms": [_row(arm) for arm in figures["arms"]],
        "shown": [a for a in figures["arms"] if not a["not_run"]],
        "budget": short_number(figures["budget"]),
        "learning": _learning(figures, ended), "finals": _finals(figures),
        "to_target": _to_target(figures), "parameters": _parameters(figures, ended),
        "moments": _moments(figures, ended), "configuration": yaml.safe_dump(
            figures["config"], sort_keys=False, allow_unicode=True),
        "failures": [(a["arm"], seed, why.strip().splitlines()[-1]) for a in figures["arms"]
                     for seed, why in a["failures"].items()],
    }, target)


def headline(figures: Mapping[str, Any]) -> tuple[str, str]:
    """What came out against the two arms that matter most, in a sentence, and its mood."""
    by_arm = {a["arm"]: a for a in figures["arms"]}
    words, moods = [], []
    for arm, name in (("fixed", "the fixed-schedule grower"),
                      ("big_matched", "the big model at equal FLOPs")):
        less = by_arm[arm]["esper_minus"] if arm in by_arm else None
        if less is None or less["low"] is None or less["high"] is None:
            continue
        sign = 1 if figures["higher_is_better"] else -1
        low, high = sorted((sign * less["low"], sign * less["high"]))
        verdict, mood = (("better than", "good") if low > 0 else ("worse than", "bad")
                         if high < 0 else ("not told apart from", "even"))
        words.append(f"{verdict} {name}")
        moods.append(mood)
    if not words:
        return "There are not enough runs to compare.", "open"
    mood = moods[0] if len(set(moods)) == 1 else "even"
    return f"On {figures['data']} esper is {' and '.join(words)}.", mood


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def _interval(e: Mapping[str, Any] | None, sign: str = "") -> tuple[str, str] | None:
    if e is None or e["value"] is None:
        return None
    if e["low"] is None or e["high"] is None:
        return _number(e["value"], sign), "one run"
    return _number(e["value"], sign), f"{_number(e['low'], sign)} to {_number(e['high'], sign)}"


def _short(spread: Mapping[str, float] | None) -> tuple[str, str] | None:
    if spread is None:
        return None
    low, middle, high = (short_number(spread[k]) for k in ("low", "median", "high"))
    return middle, "" if low == high else f"{low} to {high}"


def _row(arm: Mapping[str, Any]) -> dict[str, Any]:
    target = arm["to_target"]
    reached = None
    if target is not None:
        median = target["median"]["value"]
        reached = ("not reached" if median is None else short_number(median),
                   f"{target['reached']} of {target['of']}")
    less = arm["esper_minus"]
    return {
        **arm, "mean": _interval(arm["final"]["mean"]), "middle": _interval(arm["final"]["median"]),
        "less": _interval(less, "+"),
        "wins": None if less is None else f"better on {less['better']} of {less['count']} seeds",
        "flops_shown": _short(arm["flops"]), "time": _short(arm["seconds"]),
        "size": _short(arm["parameters"]), "peak": _short(arm["peak_parameters"]),
        "pause": _short(arm["longest_boundary"]), "reached": reached,
    }


def _curves(
    runs: Mapping[int, Run], key: str
) -> list[tuple[Sequence[float], Sequence[float]]]:
    made: list[tuple[Sequence[float], Sequence[float]]] = []
    for run in runs.values():
        rows = [r for r in run["rows"] if r[key] is not None]
        made.append(([r["flops"] for r in rows], [r[key] for r in rows]))
    return made


def _bundles(figures: Mapping[str, Any], runs: Runs, key: str) -> list[draw.Bundle]:
    # Esper's last, so that it lies on top.
    order = sorted(runs, key=lambda arm: arm == "esper")
    made = [draw.bundle(f"a-{arm}", _curves(runs[arm], key)) for arm in order]
    return [b for b in made if b is not None]


def _limits(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _learning(figures: Mapping[str, Any], runs: Runs) -> Markup | None:
    bundles = _bundles(figures, runs, "metric")
    if not bundles:
        return None
    # The first tenth of a run goes from nothing to something; what matters comes after it.
    late = [v for b in bundles for line in (b.low, b.high) for v in line[len(line) // 10:]]
    log = min(late) > 0 and max(late) / min(late) > 8
    limits = _limits(late, log)
    target = figures["target"]["value"] if figures["target"] else None
    return both(lambda width: draw.curves(
        f"{figures['metric']} over FLOPs", bundles, width=width, y_limits=limits, log=log,
        target=target))


def _parameters(figures: Mapping[str, Any], runs: Runs) -> Markup | None:
    bundles = _bundles(figures, runs, "parameters")
    if not bundles:
        return None
    limits = _limits([0.0, *(v for b in bundles for v in b.high)], False)
    return both(lambda width: draw.curves(
        "parameters over FLOPs", bundles, width=width, y_limits=(0.0, limits[1]), height=240))


def _finals(figures: Mapping[str, Any]) -> Markup | None:
    lanes = [draw.Lane(f"a-{a['arm']}", a["arm"], a["final"]["by_seed"], a["final"]["mean"])
             for a in figures["arms"] if a["runs"]]
    return both(lambda width: draw.points(
        f"{figures['metric']} at the end, by arm and seed", lanes, width=width,
        x_label=figures["metric"]))


def _to_target(figures: Mapping[str, Any]) -> Markup | None:
    lanes = [
        draw.Lane(f"a-{a['arm']}", a["arm"],
                  {s: math.inf if v is None else v for s, v in a["to_target"]["by_seed"].items()},
                  a["to_target"]["median"])
        for a in figures["arms"] if a["to_target"] is not None
    ]
    return both(lambda width: draw.points(
        "FLOPs to the target, by arm and seed", lanes, width=width, x_label="FLOPs",
        edge="not reached"))


def _moments(figures: Mapping[str, Any], runs: Runs) -> Markup | None:
    rows = []
    for seed, run in runs.get("esper", {}).items():
        row = []
        for e in run["events"]:
            if e["what"] == "transition" and e["after"] in _MOMENTS:
                css, word = _MOMENTS[e["after"]]
                name = f" {e['blueprint']}" if e["blueprint"] else ""
                row.append(draw.Moment(e["flops"], css, f"epoch {e['epoch']}, {e['site']}:{name} "
                                       f"{word}, {e['trigger']}"))
        rows.append((f"seed {seed}", row))
    last = max((r["rows"][-1]["flops"] for r in runs.get("esper", {}).values()), default=1)
    return both(lambda width: draw.moments("what grew when, in esper's runs", rows,
                                           last=last, width=width))
