"""When: strategies that say whether an epoch is one to grow at. Times are in epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol, Self

from esper.tamiyo.state import SystemState


@dataclass(frozen=True)
class Past:
    """The growths so far: the epoch of the last one, None before the first, and their number."""

    last: int | None = None
    count: int = 0


@dataclass(frozen=True)
class Answer:
    """`grow` says why to grow now. Where it is "", `hindrance` says what speaks against a growth
    that would be due otherwise, "" where none is due."""

    grow: str = ""
    hindrance: str = ""


NOT_DUE = Answer()


class Trigger(Protocol):
    """Looks at the run; remembers nothing, so that it can be asked as often as one likes."""

    @property
    def interval(self) -> int:
        """Epochs between two growths at least."""

    def stretched(self, interval: int) -> Self:
        """The same trigger with another interval."""

    def look(self, state: SystemState, past: Past) -> Answer: ...


def _checked(**values: tuple[float, float]) -> None:
    for name, (value, least) in values.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least:g}")


@dataclass(frozen=True)
class Schedule:
    """Early and periodic: every `every` epochs from `start` on, until the share `until` of the
    planned epochs is over. What joins late has no time to pay for itself. Where nobody said how
    many epochs are planned, there is no end.
    """

    start: int = 2
    every: int = 3
    until: float = 0.6

    def __post_init__(self) -> None:
        _checked(start=(self.start, 0), every=(self.every, 1), until=(self.until, 0))

    @property
    def interval(self) -> int:
        return self.every

    def stretched(self, interval: int) -> Self:
        return replace(self, every=interval)

    def look(self, state: SystemState, past: Past) -> Answer:
        if state.epoch < self.start or too_soon(state, past, self.every):
            return NOT_DUE
        end = last_epoch(self.until, state.planned_epochs)
        if end is not None and state.epoch > end:
            return Answer(hindrance=f"schedule: growth ends with epoch {end} of "
                                    f"{state.planned_epochs}")
        return Answer(f"schedule: every {self.every} epochs from {self.start}")


@dataclass(frozen=True)
class Plateau:
    """After `patience` epochs in which the best held-out loss fell by less than the share
    `min_delta` of itself; from epoch `start` on."""

    start: int = 2
    patience: int = 3
    min_delta: float = 0.01

    def __post_init__(self) -> None:
        _checked(start=(self.start, 0), patience=(self.patience, 1), min_delta=(self.min_delta, 0))

    @property
    def interval(self) -> int:
        return self.patience

    def stretched(self, interval: int) -> Self:
        return replace(self, patience=interval)

    def look(self, state: SystemState, past: Past) -> Answer:
        if state.epoch < self.start or too_soon(state, past, self.patience):
            return NOT_DUE
        flat = _flat(state.holdout_losses, self.patience, self.min_delta)
        return Answer(f"plateau: best held-out loss {flat}") if flat else NOT_DUE


@dataclass(frozen=True)
class Gap(Plateau):
    """Only what underfits grows: the training loss is flat, as in `Plateau`, and the held-out loss
    lies above it by no more than the share `max_gap` of it. Both are means over `patience` epochs;
    the gap is the sign that more capacity would go into learning the training data by heart.
    """

    max_gap: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _checked(max_gap=(self.max_gap, 0))

    def look(self, state: SystemState, past: Past) -> Answer:
        if state.epoch < self.start or too_soon(state, past, self.patience):
            return NOT_DUE
        flat = _flat(state.train_losses, self.patience, self.min_delta)
        if not flat:
            return NOT_DUE
        train = fmean(state.train_losses[-self.patience:])
        holdout = fmean(state.holdout_losses[-self.patience:])
        gap = (holdout - train) / abs(train) if train else math.inf
        said = f"the held-out loss lies {gap:.1%} above it"
        if gap <= self.max_gap:
            return Answer(f"gap: best training loss {flat}, {said}, at most {self.max_gap:.1%}")
        return Answer(hindrance=f"gap: the training loss is flat, but {said}, more than "
                                f"{self.max_gap:.1%}")


def last_epoch(until: float, planned: int | None) -> int | None:
    """The last epoch of the share `until` of a run, None where its length is not known."""
    return None if planned is None else math.floor(until * planned)


def too_soon(state: SystemState, past: Past, interval: int) -> bool:
    """Whether the last growth is less than `interval` epochs ago."""
    return past.last is not None and state.epoch - past.last < interval


def _flat(losses: Sequence[float], patience: int, min_delta: float) -> str:
    """How flat the last `patience` losses are, in words; "" where they are not."""
    if len(losses) <= patience:
        return ""
    before, recent = min(losses[:-patience]), min(losses[-patience:])
    if recent >= before - min_delta * abs(before):
        return f"{recent:.4g} after {before:.4g} {patience} epochs before"
    return ""


def look(trigger: Trigger, state: SystemState, past: Past, capacity: float) -> Answer:
    """What `trigger` says under load: its interval is divided by the slow track's capacity
    factor, which is 1 where there is no load and at least 0.1."""
    plain = trigger.look(state, past)
    if capacity >= 1 or not plain.grow:
        return plain
    interval = math.ceil(trigger.interval / max(capacity, 0.1))
    slowed = f"capacity {capacity:g} makes {trigger.interval} epochs {interval}"
    answer = trigger.stretched(interval).look(state, past)
    if answer.grow:
        return Answer(f"{plain.grow}, slowed: {slowed}")
    return Answer(hindrance=f"{plain.grow}, but {slowed}")
