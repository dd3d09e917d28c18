"""The charts of an evaluation: medians with bands, one point a seed, and what grew when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.nissa.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Series,
    _path,
    _text,
    _x_axis,
    short_number,
    svg,
)

GRID = 160  # points of a median over FLOPs
BAND = 10.0, 90.0  # percentiles over seeds


@dataclass(frozen=True)
class Bundle:
    """One arm's runs as curves over FLOPs: the median, and the band that holds most of them."""

    css: str
    xs: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def bundle(css: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Bundle | None:
    """From (FLOPs, values) of each run. Between two epochs a run stands where it stood before, and
    the median ends where the first of the runs does."""
    curves = [c for c in curves if len(c[0]) > 1]
    if not curves:
        return None
    start, end = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    xs = np.linspace(start, end, GRID)
    table = np.array([_held(xs, *c) for c in curves])
    low, middle, high = np.percentile(table, [BAND[0], 50, BAND[1]], axis=0)
    return Bundle(css, xs.tolist(), middle.tolist(), low.tolist(), high.tolist())


def _held(
    xs: npt.NDArray[np.float64], flops: Sequence[float], values: Sequence[float]
) -> npt.NDArray[np.float64]:
    at = np.searchsorted(np.asarray(flops), xs, side="right") - 1
    return np.asarray(values, dtype=np.float64)[np.maximum(at, 0)]


def curves(
    label: str, bundles: Sequence[Bundle], *, width: float, y_limits: tuple[float, float],
    log: bool = False, target: float | None = None, height: float = 300,
) -> str:
    """Medians and bands over FLOPs; a line at the target."""
    if not bundles:
        return ""
    x = Axis(0, max(b.xs[-1] for b in bundles), LEFT, width - RIGHT)
    y = Axis(*y_limits, height - BOTTOM, TOP, log)
    parts: list[str] = []
    for tick in y.ticks(5):
        parts.append(f'<path class="grid" d="M{LEFT:g} {y(tick):.1f}H{width - RIGHT:.1f}"/>')
        parts.append(_text(LEFT - 7, y(tick) + 4, "tick", "end", short_number(tick)))
    parts += _x_axis(x, height, "FLOPs", short_number, max(3, int(width // 110)))
    parts.append(f'<svg class="cut" x="0" y="0" width="{width:g}" height="{height - BOTTOM:g}">')
    if target is not None:
        parts.append(f'<path class="target" d="M{LEFT:g} {y(target):.1f}H{width - RIGHT:.1f}"/>')
    for b in bundles:
        floor = y_limits[0] if log else -math.inf
        there = [f"{x(at):.1f} {y(max(v, floor)):.1f}" for at, v in zip(b.xs, b.high, strict=True)]
        back = [f"{x(at):.1f} {y(max(v, floor)):.1f}" for at, v in zip(b.xs, b.low, strict=True)]
        parts.append(f'<path class="area {b.css}" d="M{"L".join([*there, *reversed(back)])}Z"/>')
    parts += [_path(Series(b.css, b.xs, b.middle), x, y) for b in bundles]
    parts.append("</svg>")
    return svg(width, height, label, parts)


@dataclass(frozen=True)
class Lane:
    """One arm in a chart of points. Values that are infinite stand at the right edge, hollow."""

    css: str
    name: str
    values: Mapping[str, float]
    estimate: Mapping[str, Any] | None


def points(
    label: str, lanes: Sequence[Lane], *, width: float, x_label: str, edge: str = ""
) -> str:
    """A lane an arm: every seed's value, and the estimate with its interval below them."""
    known = [v for lane in lanes for v in lane.values.values() if math.isfinite(v)]
    known += [v for lane in lanes if lane.estimate
              for k in ("low", "high") if (v := lane.estimate[k]) is not None]
    if not known:
        return ""
    narrow = width < 500
    left = 86.0 if narrow else 104.0
    room = (max(known) - min(known)) * 0.05 or abs(max(known)) * 0.05 or 1.0
    right = 30.0 if edge else RIGHT
    x = Axis(min(known) - room, max(known) + room, left, width - right)
    row, parts = 34.0, []
    height = row * len(lanes) + BOTTOM + 8
    for tick in x.ticks(4 if narrow else 7):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 0V{height - BOTTOM:.1f}"/>')
    for i, lane in enumerate(lanes):
        top = i * row
        parts.append(_text(left - 10, top + 18, "site", "end", lane.name))
        for seed, value in lane.values.items():
            away = not math.isfinite(value)
            at = width - 12.0 if away else x(value)
            shown = edge if away else f"{value:.6g}"
            parts.append(f'<circle class="at {lane.css}{" away" if away else ""}" cx="{at:.1f}" '
                         f'cy="{top + 10:.1f}" r="3.5"><title>{escape(lane.name)}, seed '
                         f"{escape(seed)}: {escape(shown)}</title></circle>")
        e = lane.estimate
        if e and e["value"] is not None:
            if e["low"] is not None and e["high"] is not None:
                parts.append(f'<path class="mean {lane.css}" d="M{x(e["low"]):.1f} '
                             f'{top + 22:.1f}H{x(e["high"]):.1f}"/>')
            parts.append(f'<path class="mean {lane.css}" d="M{x(e["value"]):.1f} '
                         f'{top + 17:.1f}v10"/>')
    parts += _x_axis(x, height, x_label, short_number, 4 if narrow else 7)
    if edge:
        parts.append(_text(width - 2, height - BOTTOM + 16, "tick", "end", "never"))
    return svg(width, height, label, parts)


@dataclass(frozen=True)
class Moment:
    """Something that happened to a seed, at so many FLOPs."""

    flops: float
    css: str
    title: str


def moments(
    label: str, rows: Sequence[tuple[str, Sequence[Moment]]], *, last: float, width: float
) -> str:
    """A row a run, a dot for each moment."""
    if not any(row for _, row in rows):
        return ""
    height = 20.0 * len(rows) + BOTTOM + 6
    x = Axis(0, last, 66, width - RIGHT)
    parts = []
    for i, (name, row) in enumerate(rows):
        at = 20.0 * i + 11
        parts.append(_text(x.start - 10, at + 4, "tick", "end", name))
        parts.append(f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts += [f'<g class="mark {m.css}"><title>{escape(m.title)}</title>'
                  f'<circle cx="{x(m.flops):.1f}" cy="{at:.1f}" r="4"/></g>' for m in row]
    parts += _x_axis(x, height, "FLOPs", short_number, max(3, int(width // 110)))
    return svg(width, height, label, parts)
