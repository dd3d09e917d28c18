"""Twins of the default policy that know nothing: what a policy is worth is what it gains over them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from esper.errors import ContractError
from esper.tamiyo.budgets import Budget
from esper.tamiyo.care import Care, Caretaker, Clockwork
from esper.tamiyo.choice import Candidate
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SystemState
from esper.tamiyo.triggers import NOT_DUE, Answer, Past, Schedule, last_epoch, too_soon


@dataclass(frozen=True)
class Times:
    """At given epochs. One at which nothing could be grown is made up for as soon as possible."""

    epochs: tuple[int, ...]
    interval: int = 1

    def stretched(self, interval: int) -> Self:
        return replace(self, interval=interval)

    def look(self, state: SystemState, past: Past) -> Answer:
        over = [e for e in self.epochs if e <= state.epoch]
        if len(over) <= past.count or too_soon(state, past, self.interval):
            return NOT_DUE
        return Answer(f"time {past.count + 1} of {len(self.epochs)}, epoch "
                      f"{sorted(over)[past.count]}")


def random_times(
    like: Schedule, planned_epochs: int, growths: int | None, seed: int
) -> Times:
    """Epochs drawn from those in which `like` may grow, each as likely as any other: `growths` of
    them, or as many as it would grow at.

    Raises:
        ContractError: there is no such epoch.
    """
    end = last_epoch(like.until, planned_epochs)
    assert end is not None
    window = range(like.start, end + 1)
    if not window:
        raise ContractError(
            f"no epoch to draw from: growth starts at {like.start} and ends at {end}, "
            f"{like.until:g} of {planned_epochs}; start earlier or end later")
    count = len(range(like.start, end + 1, like.every)) if growths is None else growths
    drawn = random.Random(f"times {seed}").sample(window, min(count, len(window)))
    return Times(tuple(sorted(drawn)))


class AnyChoice:
    """Every site that something fits is as good as any other, and so is every kernel for it."""

    scored = False
    version = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(f"choice {seed}")

    def values(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Sequence[tuple[float, str]]:
        sites = sorted({c.site.name for c in candidates})
        lot = self._random.choice(sites)  # the site first: many kernels make no site likelier
        return [(self._random.random() + (c.site.name == lot), "drawn at random")
                for c in candidates]

    def state_dict(self) -> dict[str, object]:
        return {"random": self._random.getstate()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._random.setstate(state_dict["random"])  # type: ignore[arg-type]


class InTurn:
    """The site with the fewest fossils, in the model's order; for it the library's oldest kernel,
    or the oldest of the blueprint of this name."""

    scored = False
    version = "fixed"

    def __init__(self, blueprint: str | None = None) -> None:
        self.blueprint = blueprint

    def values(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Sequence[tuple[float, str]]:
        place = {s.name: (s.fossils, i) for i, s in enumerate(state.sites)}
        named = {b for b, ir in catalog.blueprints.items() if ir.name == self.blueprint}
        keys = [(*place[c.site.name], c.kernel.created) for c in candidates]
        order = {key: -float(i) for i, key in enumerate(sorted(set(keys)))}
        return [
            (order[key], "the next site's first kernel")
            if self.blueprint is None or c.kernel.blueprint_id in named
            else (-math.inf, f"not the blueprint {self.blueprint!r}")
            for c, key in zip(candidates, keys, strict=True)
        ]


class RandomTwin(HeuristicPolicy):
    """Random place, time and kernel; for the rest as the policy it is the twin of. It grows as
    often as `like` would, within the same epochs, under the same budgets, and cares for its seeds
    in the same way.

    Args:
        planned_epochs: of the run; without them there is no window to draw times from.
        like: when the policy grows that this is the twin of.
        growths: how often, where that is not to be told from `like`.
        others: as for HeuristicPolicy.

    Raises:
        ContractError: the window has no epoch.
    """

    def __init__(
        self, planned_epochs: int, *, like: Schedule | None = None, growths: int | None = None,
        care: Caretaker | None = None, budget: Budget | None = None, max_growths: int = 8,
        max_active: int = 1, tags: tuple[str, ...] = (), again: bool = False, seed: int = 0,
    ) -> None:
        super().__init__(
            trigger=random_times(like or Schedule(), planned_epochs, growths, seed),
            chooser=AnyChoice(seed), care=care or Care(), budget=budget or Budget(),
            max_growths=max_growths, max_active=max_active, tags=tags, again=again, seed=seed)


class FixedSchedule(HeuristicPolicy):
    """Sites in turn, at fixed epochs, each time the same kind of kernel; seeds move on by the
    clock. No measurement is asked for, and none looked at.

    Args:
        trigger: when.
        blueprint: the name of the blueprint to grow; without one, the library's oldest.
        others: as for HeuristicPolicy.
    """

    def __init__(
        self, *, trigger: Schedule | None = None, blueprint: str | None = None,
        care: Clockwork | None = None, budget: Budget | None = None, max_growths: int = 8,
        max_active: int = 1, tags: tuple[str, ...] = (), seed: int = 0,
    ) -> None:
        super().__init__(
            trigger=trigger or Schedule(), chooser=InTurn(blueprint), care=care or Clockwork(),
            budget=budget or Budget(), max_growths=max_growths, max_active=max_active, tags=tags,
            again=True, seed=seed)
