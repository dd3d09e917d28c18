"""The live view: a panel in a terminal, and only what is new in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from esper.cli.live import LiveView, SiteLine, Snapshot, clock, sparkline
from esper.leyline.library import QueueDepths
from esper.leyline.lifecycle import SeedState

DEPTHS = QueueDepths(karn_to_tezzeret=7, tezzeret_to_urabrask=1, urabrask_validation=0,
                     urza_storage=0)


def _snapshot(epoch: int, decisions: tuple[str, ...] = (), title: str = "digits") -> Snapshot:
    return Snapshot(
        title=title, epoch=epoch, epochs=9, step=10 * epoch, elapsed=61.0 * epoch,
        train_loss=1 / epoch, eval_loss=1.1 / epoch, parameters=1354, depths=DEPTHS, capacity=0.7,
        sites=(SiteLine("blocks.0", SeedState.GRAFTING, 0.25, "k-1", gain=0.01),
               SiteLine("blocks.1", SeedState.DORMANT)),
        budgets=(("latency", "1.2 of 3 ms"),),
        decisions=decisions)


def test_a_pipe_gets_one_line_an_epoch_and_every_decision_once() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=200)) as view:
        view.show(_snapshot(1, ("[a] first",)))
        view.show(_snapshot(1, ("[a] first",)))
        view.show(_snapshot(2, ("[a] first", "second")))
        view.show(_snapshot(3, ("second", "third")))  # a window of the last two
        view.show(_snapshot(1, title="control"))
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "epoch" not in line] == [
        "[1:01] [a] first", "[2:02] second", "[3:03] third"]
    epochs = [line for line in lines if "epoch" in line]
    assert len(epochs) == 4
    assert "epoch 2/9" in epochs[1] and "blocks.0 GRAFTING at 0.25" in epochs[1]
    assert "accuracy" not in epochs[0]  # it is not known, so nothing is said
    assert "\x1b" not in out.getvalue()


def test_a_pipe_is_not_flooded_by_short_epochs() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=200)) as view:
        for epoch in range(1, 101):
            view.show(Snapshot(title="t", epoch=epoch, epochs=100, step=epoch,
                               elapsed=0.1 * epoch, eval_loss=1.0))
    lines = out.getvalue().splitlines()
    assert 5 <= len(lines) <= 8
    assert "epoch 1/100" in lines[0] and "epoch 100/100" in lines[-1]


@pytest.mark.parametrize("width", [60, 110])
def test_a_terminal_gets_a_panel_that_fits(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, height=40, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.show(_snapshot(1))
        view.show(_snapshot(2, ("x" * 300,)))
    text = out.getvalue()
    for part in ("digits", "epoch 2/9", "GRAFTING", "0.25", "to compile", "capacity 0.7", "1,354",
                 "1.2 of 3 ms"):
        assert part in text
    assert max(len(line) for line in text.split("\n") if "\x1b" not in line) <= width


def test_unknown_things_are_shown_as_unknown() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, height=40, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.show(Snapshot(title="t", epoch=0, epochs=0, step=0, elapsed=0, capacity=1.0))
    assert "the library has not answered" in out.getvalue() and "eval loss -" in out.getvalue()


def test_a_run_without_growth_waits_for_nothing() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, height=40, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.show(Snapshot(title="control", epoch=1, epochs=2, step=3, elapsed=4))
    assert "control" in out.getvalue() and "waiting" not in out.getvalue()


def test_sparklines_and_clocks() -> None:
    assert sparkline([1.0]) == "" and sparkline([]) == ""
    assert sparkline([0, 1, float("nan"), 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert (clock(187), clock(3729)) == ("3:07", "1:02:09")
