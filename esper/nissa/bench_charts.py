"""The charts of a benchmark page: latency by batch, roofline, distributions, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from esper.leyline.verdict import RiskCalibration, Roofline
from esper.nissa.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Format,
    Series,
    _path,
    _text,
    _x_axis,
    duration,
    short_number,
    svg,
)


@dataclass(frozen=True)
class Point:
    """One side at one batch size: median and, where there are enough calls, 99th percentile."""

    batch: int
    p50: float
    p99: float | None


@dataclass(frozen=True)
class _AtBatches(Axis):
    """A logarithmic axis whose ticks are the batch sizes that were measured."""

    batches: tuple[float, ...] = ()

    def ticks(self, wanted: int) -> list[float]:
        return list(self.batches)


def _grid(y: Axis, width: float, form: Format) -> list[str]:
    parts = []
    for tick in y.ticks(5):
        at = y(tick)
        label = form(tick)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{width - RIGHT:.1f}"/>')
        parts.append(_text(LEFT - 7, at + 4, "tick", "end", label))
    return parts


def _log(values: Sequence[float], room: float = 1.25) -> tuple[float, float]:
    return min(values) / room, max(values) * room


def latency(label: str, sides: Mapping[str, Sequence[Point]], *, width: float) -> str:
    """Time of a step over the batch size, both logarithmic; whiskers reach from p50 to p99.

    Keys of `sides` are classes of the page.
    """
    points = [p for side in sides.values() for p in side]
    if not points:
        return ""
    height = 270.0
    batches = sorted({float(p.batch) for p in points})
    low, high = _log(batches, 1.15)
    x = _AtBatches(low, high, LEFT, width - RIGHT, True, tuple(batches))
    y = Axis(*_log([v for p in points for v in (p.p50, p.p99 or p.p50)]), height - BOTTOM, TOP,
             log=True)
    parts = [*_grid(y, width, duration), *_x_axis(x, height, "batch", short_number, 5)]
    for nudge, (css, side) in enumerate(sides.items()):
        parts.append(_path(Series(css, [p.batch for p in side], [p.p50 for p in side]), x, y))
        for p in side:
            at = x(p.batch) + 3.0 * nudge  # so that whiskers of one batch do not cover each other
            if p.p99 is not None:
                parts.append(f'<path class="tail {css}" d="M{at:.1f} {y(p.p50):.1f}'
                             f'V{y(p.p99):.1f}"/>')
            tail = f", p99 {duration(p.p99)}" if p.p99 is not None else ""
            parts.append(
                f'<circle class="at {css}" cx="{x(p.batch):.1f}" cy="{y(p.p50):.1f}" r="3.5">'
                f"<title>{css}, batch {p.batch}: p50 {duration(p.p50)}{tail}</title></circle>")
    return svg(width, height, label, parts)


@dataclass(frozen=True)
class Spot:
    """Work that was done: operations per byte, and operations a second."""

    css: str
    batch: int
    intensity: float
    flops_per_second: float


def roofline(label: str, roof: Roofline, spots: Sequence[Spot], *, width: float) -> str:
    """Operations a second over operations per byte, under what the machine reached itself."""
    if not spots:
        return ""
    height = 290.0
    knees = [roof.flops_per_second / b for b in
             (roof.memory_bytes_per_second, roof.cache_bytes_per_second)]
    low, high = _log([*(s.intensity for s in spots), *knees], 2.0)
    x = Axis(low, high, LEFT, width - RIGHT, log=True)
    done = [s.flops_per_second for s in spots]
    y = Axis(*_log([*done, roof.flops_per_second], 1.6), height - BOTTOM, TOP, log=True)
    parts = [*_grid(y, width, short_number), *_x_axis(x, height, "FLOP per byte", short_number, 5)]
    parts.append(f'<svg class="cut" x="0" y="0" width="{width:g}" height="{height - BOTTOM:g}">')
    for css, bandwidth in (("memory", roof.memory_bytes_per_second),
                           ("cache", roof.cache_bytes_per_second)):
        knee = roof.flops_per_second / bandwidth
        parts.append(_path(Series(f"roof {css}", [low, knee, high],
                                  [low * bandwidth, *[roof.flops_per_second] * 2]), x, y))
    parts.append("</svg>")
    for s in spots:
        share = s.flops_per_second / min(
            roof.flops_per_second, s.intensity * roof.memory_bytes_per_second)
        at_x, at_y = x(s.intensity), y(s.flops_per_second)
        parts.append(
            f'<circle class="at {s.css}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"><title>{s.css}, '
            f"batch {s.batch}: {short_number(s.flops_per_second)}FLOP/s, {share:.0%} of the "
            f"memory roof</title></circle>")
        if s.css == "kernel":
            parts.append(_text(at_x, at_y - 8, "tick", "middle", str(s.batch)))
    return svg(width, height, label, parts)


def distribution(label: str, sides: Mapping[str, Sequence[float]], *, width: float) -> str:
    """How single calls are spread, one outline a side, as shares of its calls."""
    values = [v for side in sides.values() for v in side if v > 0 and math.isfinite(v)]
    if not values:
        return ""
    height = 200.0
    # The slowest of a thousand calls may be ten times the rest, and would flatten them all.
    low, high = min(values) / 1.05, float(np.percentile(values, 99.5)) * 1.05
    x = Axis(low, high, LEFT, width - RIGHT, log=True)
    edges = np.geomspace(low, high, max(16, int(width // 9)))
    shares = {css: np.histogram(np.clip(side, low, high), edges)[0] / len(side)
              for css, side in sides.items()}
    y = Axis(0, max(float(s.max()) for s in shares.values()) * 1.05, height - BOTTOM, TOP)
    parts = [f'<path class="grid" d="M{LEFT:g} {y(0):.1f}H{width - RIGHT:.1f}"/>']
    for tick in y.ticks(3):
        parts.append(f'<path class="grid" d="M{LEFT:g} {y(tick):.1f}H{width - RIGHT:.1f}"/>')
        parts.append(_text(LEFT - 7, y(tick) + 4, "tick", "end", f"{tick:.0%}"))
    for css, share in shares.items():
        pieces = [f"M{x(edges[0]):.1f} {y(0):.1f}"]
        for value, right in zip(share, edges[1:], strict=True):
            pieces.append(f"V{y(float(value)):.1f}H{x(float(right)):.1f}")
        pieces.append(f"V{y(0):.1f}")
        parts.append(f'<path class="spread {escape(css)}" d="{"".join(pieces)}"/>')
    wanted = 5 if width > 500 else 3
    parts += _x_axis(_Few(low, high, x.start, x.end, log=True), height, "one step", duration,
                     wanted)
    return svg(width, height, label, parts)


class _Few(Axis):
    """A logarithmic axis over less than two decades, with evenly spread round ticks."""

    def ticks(self, wanted: int) -> list[float]:
        rough = np.geomspace(self.low, self.high, wanted + 2)[1:-1]
        return sorted({float(f"{value:.2g}") for value in rough})


def calibration(label: str, found: RiskCalibration, *, width: float) -> str:
    """Share of failures over predicted risk, of kernels that were held out."""
    height = 260.0
    x = Axis(0, 1, LEFT, width - RIGHT)
    y = Axis(0, 1, height - BOTTOM, TOP)
    parts = [*_grid(y, width, short_number), *_x_axis(x, height, "predicted", short_number, 5)]
    parts.append(_path(Series("control", [0, 1], [0, 1]), x, y))
    parts.append(_path(Series("grown", [b.predicted for b in found.curve],
                              [b.observed for b in found.curve]), x, y))
    for b in found.curve:
        parts.append(
            f'<circle class="at kernel" cx="{x(b.predicted):.1f}" cy="{y(b.observed):.1f}" '
            f'r="{2 + math.sqrt(b.count) / 2:.1f}"><title>{b.count} reports: predicted '
            f"{b.predicted:.2f}, observed {b.observed:.2f}</title></circle>")
    return svg(width, height, label, parts)
