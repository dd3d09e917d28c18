"""Charts as SVG, coloured by the page's style sheet, so that dark mode and print work.

A picture that is scaled down takes its letters with it; so every chart is drawn for a width
in pixels, and the page holds one for a desk and one for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Format = Callable[[float], str]
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 22.0, 34.0


@dataclass(frozen=True)
class Series:
    """A line. Points that are not finite leave a gap. `css` is its class in the page."""

    css: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    steps: bool = False


@dataclass(frozen=True)
class Mark:
    """A moment on the x axis; `title` is shown when pointed at."""

    x: float
    css: str
    title: str


@dataclass(frozen=True)
class Band:
    """One site in one state from `start` to `end`."""

    start: float
    end: float
    css: str
    title: str


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; fewer over many decades."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if top - bottom <= 3 else (1,)
    ticks = [f * 10.0**p for p in range(bottom, top + 1) for f in factors]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def short_number(value: float) -> str:
    """1234567 as 1.23 M; small ones in up to three figures."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """0.0123 as 12.3 ms."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = self.low, self.high, value
        if self.log:
            a, b, v = math.log(a), math.log(b), math.log(v)
        share = (v - a) / (b - a) if b > a else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(
            self.low, self.high, wanted)


def svg(width: float, height: float, label: str, parts: Iterable[str], css: str = "chart") -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, css: str, anchor: str, text: str) -> str:
    return (f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>")


def _path(series: Series, x: Axis, y: Axis) -> str:
    pieces: list[str] = []
    pen_down = False
    for px, py in zip(series.xs, series.ys, strict=True):
        if py is None or not math.isfinite(py) or (y.log and py <= 0):
            pen_down = False
            continue
        at_x, at_y = x(px), y(py)
        if not pen_down:
            pieces.append(f"M{at_x:.1f} {at_y:.1f}")
        else:
            pieces.append(f"H{at_x:.1f}V{at_y:.1f}" if series.steps else f"L{at_x:.1f} {at_y:.1f}")
        pen_down = True
    return f'<path class="line {series.css}" d="{"".join(pieces)}"/>' if pieces else ""


def _x_axis(x: Axis, height: float, label: str, form: Format, wanted: int) -> list[str]:
    base = height - BOTTOM
    parts = [f'<path class="axis" d="M{x.start:.1f} {base:.1f}H{x.end:.1f}"/>']
    for tick in x.ticks(wanted):
        at = x(tick)
        parts.append(f'<path class="axis" d="M{at:.1f} {base:.1f}v4"/>')
        parts.append(_text(at, base + 16, "tick", "middle", form(tick)))
    parts.append(_text(x.end, height - 3, "name", "end", label))
    return parts


def line_chart(
    label: str,
    series: Sequence[Series],
    *,
    width: float,
    height: float = 260,
    marks: Sequence[Mark] = (),
    y_form: Format = short_number,
    x_label: str = "epoch",
    from_zero: bool = False,
    floor: float | None = None,
) -> str:
    """Lines over a shared x, with marked moments. Empty where there is no finite point.

    The y axis is logarithmic where the values span more than a factor of eight. Below
    `floor` the lines are cut off.
    """
    values = [v for s in series for v in s.ys if v is not None and math.isfinite(v)]
    xs = [v for s in series for v in s.xs]
    if not values or not xs:
        return ""
    low, high = max(min(values), min(values) if floor is None else floor), max(values)
    log = not from_zero and floor is None and low > 0 and high / low > 8
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low = 0.0 if from_zero else low if floor is not None else low - room
        high += room
    x = Axis(min(xs), max(xs), LEFT, width - RIGHT)
    y = Axis(low, high, height - BOTTOM, TOP, log)
    parts: list[str] = []
    for tick in y.ticks(5):
        at = y(tick)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{width - RIGHT:.1f}"/>')
        parts.append(_text(LEFT - 7, at + 4, "tick", "end", y_form(tick)))
    parts += _x_axis(x, height, x_label, short_number, max(3, int(width // 110)))
    for m in marks:
        at = min(max(x(m.x), x.start), x.end)
        parts.append(
            f'<g class="mark {m.css}"><title>{escape(m.title)}</title>'
            f'<path d="M{at:.1f} {TOP - 8:g}V{height - BOTTOM:.1f}"/>'
            f'<circle cx="{at:.1f}" cy="{TOP - 10:g}" r="4"/></g>'
        )
    # A nested svg cuts off what lies outside it, with no id that could clash in the page.
    parts.append(f'<svg class="cut" x="0" y="0" width="{width:g}" height="{height - BOTTOM:g}">')
    parts += [_path(s, x, y) for s in series]
    parts.append("</svg>")
    return svg(width, height, label, parts)


def timeline(
    label: str, rows: Sequence[tuple[str, Sequence[Band]]], *, last: float, width: float
) -> str:
    """One row per site, the state as a band over steps; the site's name above its row."""
    row = 40.0
    height = row * len(rows) + BOTTOM + 4
    x = Axis(0, max(last, 1), 6, width - RIGHT)
    parts: list[str] = []
    for i, (name, bands) in enumerate(rows):
        top = i * row
        parts.append(_text(x.start, top + 13, "site", "start", name))
        for b in bands:
            # A state that lasted one step must not vanish.
            extent = max(2.0, x(b.end) - x(b.start))
            parts.append(
                f'<rect class="band {b.css}" x="{x(b.start):.1f}" y="{top + 19:.1f}" '
                f'width="{extent:.1f}" height="15"><title>{escape(b.title)}</title></rect>'
            )
    parts += _x_axis(x, height, "step", short_number, max(3, int(width // 110)))
    return svg(width, height, label, parts)


def step_histogram(
    label: str,
    seconds: npt.NDArray[np.float64],
    special: npt.NDArray[np.float64],
    *,
    width: float,
    height: float = 220,
) -> str:
    """How long steps took, on a logarithmic axis; `special` ones are marked one by one.

    Counts are drawn by their square root, for one slow step matters and must be seen.
    """
    times = seconds[np.isfinite(seconds) & (seconds > 0)]
    if not len(times):
        return ""
    low, high = float(np.min(times)) / 1.1, float(np.max(times)) * 1.1
    x = Axis(low, high, LEFT, width - RIGHT, log=True)
    edges = np.geomspace(low, high, max(12, int(width // 14)))
    counts, _ = np.histogram(times, edges)
    base = height - BOTTOM - 14  # the marks have a lane of their own below the bars
    y = Axis(0, math.sqrt(np.max(counts)), base, TOP)
    parts = [f'<path class="grid" d="M{LEFT:g} {base:.1f}H{width - RIGHT:.1f}"/>']
    most = int(np.max(counts))
    for tick in sorted({1, *(t for t in (10, 100, 1000, 10_000, 100_000) if t < most / 2), most}):
        at = y(math.sqrt(tick))
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{width - RIGHT:.1f}"/>')
        parts.append(_text(LEFT - 7, at + 4, "tick", "end", f"{tick:,}"))
    for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            top = y(math.sqrt(count))
            parts.append(
                f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, x(b) - x(a) - 1):.1f}" height="{y.start - top:.1f}">'
                f"<title>{count} steps, {duration(a)} to {duration(b)}</title></rect>"
            )
    for name, at in (("p50", np.percentile(times, 50)), ("p99", np.percentile(times, 99))):
        px = x(float(at))
        parts.append(f'<path class="quantile" d="M{px:.1f} {TOP - 6:g}V{y.start:.1f}"/>')
        parts.append(_text(px, TOP - 9, "tick", "middle", name))
    parts += [
        f'<circle class="growth" cx="{x(float(s)):.1f}" cy="{base + 7:.1f}" r="3.5">'
        f"<title>a step beside a transition: {duration(float(s))}</title></circle>"
        for s in special if s > 0 and math.isfinite(s)
    ]
    wide = x.end - x.start
    form_ticks = _x_axis(x, height, "duration of a step", duration, 5)
    if len(x.ticks(5)) * 58 > wide:  # keep whole decades only where the labels would collide
        form_ticks = _x_axis(_Decades(x.low, x.high, x.start, x.end, True), height,
                             "duration of a step", duration, 5)
    return svg(width, height, label, [*parts, *form_ticks])


class _Decades(Axis):
    def ticks(self, wanted: int) -> list[float]:
        bottom, top = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        whole = [10.0**p for p in range(bottom, top + 1)]
        return whole or super().ticks(wanted)[:2]


def interval(speedup: float, low: float, high: float, limit: float) -> str:
    """A point with its interval on a log axis from 1/limit to limit; the line is at 1."""
    width, height = 120.0, 16.0
    x = Axis(1 / limit, limit, 4, width - 4, log=True)

    def at(value: float) -> float:
        return x(min(max(value, 1 / limit), limit))

    css = "fast" if low > 1 else "slow" if high < 1 else "unsure"
    return svg(width, height, f"{speedup:.2f}, between {low:.2f} and {high:.2f}", [
        f'<path class="axis" d="M{x(1):.1f} 0V{height:g}"/>',
        f'<path class="whisker {css}" d="M{at(low):.1f} 8H{at(high):.1f}"/>',
        f'<circle class="point {css}" cx="{at(speedup):.1f}" cy="8" r="3.5"/>',
    ], css="interval")
