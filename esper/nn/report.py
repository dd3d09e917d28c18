"""What `accelerate` did: one row per module, with the reason or the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One module. `speedup` is plain time over accelerated time, forward and backward, at the
    example's shape, with its 95 % interval; None where nothing was measured."""

    name: str
    kind: str
    replaced: bool
    reason: str
    speedup: tuple[float, float, float] | None = None

    @property
    def ratio(self) -> str:
        if self.speedup is None:
            return ""
        middle, low, high = self.speedup
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model's modules. Printing it prints the table."""

    rows: tuple[Row, ...]
    _undo: Callable[[], object] = field(repr=False, compare=False)

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.replaced)

    @property
    def refused(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if not r.replaced)

    def undo(self) -> None:
        """Take every kernel out of the model again."""
        self._undo()

    def __str__(self) -> str:
        table = Table(title=f"{len(self.replaced)} of {len(self.rows)} modules accelerated",
                      title_justify="left")
        for heading in ("module", "type", "", "speedup", "why"):
            table.add_column(heading, overflow="fold")
        for r in self.rows:
            table.add_row(*(Text(c) for c in (
                r.name or "(the model)", r.kind, "replaced" if r.replaced else "refused",
                r.ratio, r.reason)))
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()
