"""The live view of a run: a redrawn panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.leyline.library import QueueDepths
from esper.leyline.lifecycle import ACTIVE, SeedState

_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {
    SeedState.DORMANT: "dim",
    SeedState.FOSSILIZED: "green",
    SeedState.CULLED: "red",
    SeedState.CANCELLED: "red",
    SeedState.ROLLED_BACK: "bold red",
}
DECISIONS_SHOWN = 6
SECONDS_BETWEEN_LINES = 2.0  # where there is no terminal; an epoch may take milliseconds


@dataclass(frozen=True)
class SiteLine:
    """One site. `alpha`, `kernel` and `gain` are None where there is none to show; `fossils`
    counts the seeds that were kept there."""

    name: str
    state: SeedState
    alpha: float | None = None
    kernel: str | None = None
    fossils: int = 0
    gain: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """The run at one moment. What is not known is None, never zero.

    `title` names the run and what it is doing; `decisions` are the last ones, oldest first;
    `elapsed` is in seconds. `capacity` is None in a run without a library, `depths` also in one
    whose library has not answered. `budgets` are names and what is spent of them.
    """

    title: str
    epoch: int
    epochs: int
    step: int
    elapsed: float
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    parameters: int | None = None
    sites: tuple[SiteLine, ...] = ()
    depths: QueueDepths | None = None
    capacity: float | None = None
    budgets: tuple[tuple[str, str], ...] = ()
    decisions: tuple[str, ...] = ()


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as blocks, lowest to highest; empty for fewer than two."""
    shown = [v for v in values[-width:] if v == v and abs(v) != float("inf")]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    step = (high - low) / (len(_BLOCKS) - 1) or 1.0
    return "".join(_BLOCKS[round((v - low) / step)] for v in shown)


def clock(seconds: float) -> str:
    """3:07 or 1:02:09."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _figures(s: Snapshot) -> list[tuple[str, str]]:
    return [
        ("train loss", "-" if s.train_loss is None else f"{s.train_loss:.4f}"),
        ("eval loss", "-" if s.eval_loss is None else f"{s.eval_loss:.4f}"),
        ("accuracy", "-" if s.eval_accuracy is None else f"{s.eval_accuracy:.2%}"),
        ("parameters", "-" if s.parameters is None else f"{s.parameters:,}"),
    ]


def _new(before: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, ...]:
    """What came in since, where both are the last few of one growing list."""
    for shared in range(min(len(before), len(now)), 0, -1):
        if before[-shared:] == now[:shared]:
            return now[shared:]
    return now


class LiveView:
    """Shows snapshots; a context manager. Called from the training thread, between steps.

    Drawing happens at most `per_second` times a second, on rich's own thread.
    """

    def __init__(self, console: Console | None = None, per_second: float = 4.0) -> None:
        self.console = console if console is not None else Console()
        self._history: list[float] = []
        self._decisions: tuple[str, ...] = ()
        self._line_at = float("-inf")
        self._epoch: tuple[str, int] | None = None
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=per_second,
                              redirect_stdout=True, redirect_stderr=True)

    def show(self, snapshot: Snapshot) -> None:
        """Show the run as it is now. Plain output says only what is new."""
        at = (snapshot.title, snapshot.epoch)
        new_epoch = at != self._epoch
        if self._epoch is not None and self._epoch[0] != snapshot.title:
            self._history.clear()
            self._line_at = float("-inf")
        self._epoch = at
        if new_epoch and snapshot.eval_loss is not None:
            self._history.append(snapshot.eval_loss)
        if self._live is not None:
            self._live.update(self._panel(snapshot))
        else:
            self._lines(snapshot, new_epoch)

    def say(self, text: str) -> None:
        """Say one line, above the panel where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # -- no terminal ----------------------------------------------------------------------

    def _lines(self, s: Snapshot, new_epoch: bool) -> None:
        for decision in _new(self._decisions, s.decisions):
            self.say(f"[{clock(s.elapsed)}] {decision}")
        self._decisions = s.decisions
        due = s.epoch in (1, s.epochs) or s.elapsed - self._line_at >= SECONDS_BETWEEN_LINES
        if not new_epoch or not due:
            return
        self._line_at = s.elapsed
        figures = "  ".join(f"{name} {value}" for name, value in _figures(s) if value != "-")
        sites = ", ".join(
            f"{r.name} {r.state}" + ("" if r.alpha is None else f" at {r.alpha:.2f}")
            for r in s.sites if r.state in ACTIVE
        )
        self.say(f"[{clock(s.elapsed)}] {s.title}: epoch {s.epoch}/{s.epochs}  {figures}"
                  + (f"  ({sites})" if sites else ""))

    # -- a terminal -----------------------------------------------------------------------

    def _panel(self, s: Snapshot) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(f"epoch {s.epoch}/{s.epochs} · step {s.step:,}",
                     ProgressBar(total=max(1, s.epochs), completed=s.epoch), clock(s.elapsed))
        figures = Text()
        for name, value in _figures(s):
            figures.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
        figures.append(sparkline(self._history), style="cyan")
        parts: list[RenderableType] = [head, figures]
        if s.sites:
            parts += [Text(), self._sites(s.sites)]
        if s.capacity is not None:  # a run without growth waits for nothing
            parts += [Text(), self._pipeline(s)]
        if s.budgets:
            parts.append(self._budgets(s))
        if s.decisions:
            parts.append(Text())
            parts += [Text(d, style="" if i == 0 else "dim", overflow="ellipsis", no_wrap=True)
                      for i, d in enumerate(reversed(s.decisions[-DECISIONS_SHOWN:]))]
        return Panel(Group(*parts), title=Text(s.title), border_style="dim")

    def _sites(self, sites: Sequence[SiteLine]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("site", no_wrap=True)
        table.add_column("state", no_wrap=True, min_width=13)
        table.add_column("alpha", no_wrap=True, min_width=15)
        table.add_column("gain", justify="right", no_wrap=True)
        table.add_column("grown", justify="right", no_wrap=True)
        table.add_column("kernel", no_wrap=True, ratio=1, overflow="ellipsis")
        for r in sites:
            alpha = Text("-", style="dim")
            if r.alpha is not None:
                full = round(10 * r.alpha)
                alpha = Text(f"{'━' * full}", style="cyan")
                alpha.append("━" * (10 - full), style="dim").append(f" {r.alpha:.2f}", style="")
            table.add_row(
                Text(r.name), Text(str(r.state), style=_STYLES.get(r.state, "yellow")), alpha,
                "-" if r.gain is None else f"{r.gain:+.4f}", str(r.fossils),
                Text(r.kernel or "-", style="" if r.kernel else "dim"),
            )
        return table

    def _budgets(self, s: Snapshot) -> Text:
        text = Text("spent    ", style="dim")
        for name, spent in s.budgets:
            text.append(f"{spent} ", style="bold").append(f"{name}   ", style="dim")
        return text

    def _pipeline(self, s: Snapshot) -> Text:
        text = Text("waiting  ", style="dim")
        if s.depths is None:
            return text.append("not known (the library has not answered)")
        for name, label in (
            ("karn_to_tezzeret", "to compile"),
            ("tezzeret_to_urabrask", "to prove"),
            ("urabrask_validation", "being proved"),
            ("urza_storage", "to store"),
        ):
            text.append(f"{getattr(s.depths, name)} ", style="bold")
            text.append(f"{label}   ", style="dim")
        assert s.capacity is not None
        style = "bold" if s.capacity >= 1 else "bold yellow"
        return text.append("capacity ", style="dim").append(f"{s.capacity:g}", style=style)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
