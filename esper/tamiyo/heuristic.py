"""The default policy: strategies for when, where and which, and for what becomes of seeds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.command import Action, Command
from esper.leyline.events import new_id
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.budgets import Books, Budget
from esper.tamiyo.care import Care, Caretaker
from esper.tamiyo.choice import Chooser
from esper.tamiyo.offers import Offers, ranked
from esper.tamiyo.ranking import FieldRanking
from esper.tamiyo.state import Catalog, Considered, Decision, SiteStatus, SystemState
from esper.tamiyo.triggers import Past, Schedule, Trigger, look


@dataclass
class HeuristicPolicy:
    """Grows when `trigger` says so, at most one seed at a boundary. Load slows it: the trigger's
    interval is divided by the slow track's capacity factor.

    Of all kernels that fit a dormant site, what is left of `budget` and `tags` (all of which a
    kernel must carry, see urabrask.tags: "high_speed", "low_memory", ...), and whose blueprint was
    not tried at that site before unless `again`, it takes the one that `chooser` values most; of
    equal ones, any. `care` says what becomes of seeds on their way.

    There are never more than `max_active` seeds on their way, nor more than `max_growths` in all;
    those that were culled do not count.
    """

    trigger: Trigger = field(default_factory=Schedule)
    chooser: Chooser = field(default_factory=FieldRanking)
    care: Caretaker = field(default_factory=Care)
    budget: Budget = field(default_factory=Budget)
    max_growths: int = 8
    max_active: int = 1
    tags: tuple[str, ...] = ()
    again: bool = False
    seed: int = 0
    _books: Books = field(init=False, repr=False)
    _random: random.Random = field(init=False, repr=False)
    _past: Past = field(init=False, repr=False, default=Past())

    def __post_init__(self) -> None:
        self._books, self._random = Books(self.budget), random.Random(self.seed)

    @property
    def version(self) -> str:
        """Who says where and which, for reports and records."""
        return str(getattr(self.chooser, "version", type(self.chooser).__name__))

    # -- deciding -------------------------------------------------------------------------

    def _free(self, state: SystemState) -> list[SiteStatus]:
        """Sites at which a seed may be put now."""
        active = sum(s.kernel_id is not None for s in state.sites)
        if active >= self.max_active or state.growths >= self.max_growths:
            return []
        return [s for s in state.sites if s.state is SeedState.DORMANT]

    def _offers(self, state: SystemState, catalog: Catalog) -> Offers:
        return Offers(self._free(state), catalog, self._books, self._books.spent(state),
                      self.tags, self.again)

    def wants(self, state: SystemState, catalog: Catalog) -> frozenset[str]:
        """Gains that are due to be looked at; scores only where a seed could be put right now."""
        wanted = self.care.looks_at(state)
        if (getattr(self.chooser, "scored", True) and self._free(state)
                and look(self.trigger, state, self._past, catalog.capacity).grow):
            wanted |= self._offers(state, catalog).open()
        return wanted

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        """Commands for this boundary; at most one germination."""
        commands = self.care.commands(state)
        budgets = self._books.shown(self._books.spent(state))
        considered: list[Considered] = []
        put_off = ""
        if self._free(state):
            answer = look(self.trigger, state, self._past, catalog.capacity)
            put_off = answer.hindrance
            if answer.grow:
                germination, considered = self._germinate(answer.grow, state, catalog)
                commands += germination
        return Decision(tuple(commands), tuple(considered), put_off, budgets)

    def _germinate(
        self, reason: str, state: SystemState, catalog: Catalog
    ) -> tuple[list[Command], list[Considered]]:
        offers = self._offers(state, catalog)
        candidates = offers.candidates()
        if not candidates:
            return [], [c for site in offers.sites for c in offers.refused(site)]
        values = self.chooser.values(candidates, state, catalog)
        best = max(value for value, _ in values)
        if best == -math.inf:
            return [], [Considered(c.kernel.kernel_id, c.site.name, False, why)
                        for c, (_, why) in zip(candidates, values, strict=True)]
        chosen = self._random.choice([i for i, (v, _) in enumerate(values) if v == best])
        site, kernel, why = candidates[chosen].site, candidates[chosen].kernel, values[chosen][1]
        score = "" if site.score is None else f"; site score {site.score:.3g}"
        trace = new_id("tr")
        self._books.book(trace, kernel, site, state, catalog.blueprints)
        self._past = Past(state.epoch, self._past.count + 1)
        return [Command(
            action=Action.GERMINATE, trace_id=trace, site=site.name, kernel_id=kernel.kernel_id,
            blueprint_id=kernel.blueprint_id, reason=f"{reason}{score}; {why}",
        )], ranked(candidates, values, chosen) + offers.refused(site)

    # -- a run that is saved --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        chooser = self.chooser.state_dict() if hasattr(self.chooser, "state_dict") else None
        return {"random": self._random.getstate(), "last": self._past.last,
                "count": self._past.count, "booked": self._books.state_dict(), "chooser": chooser}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random.setstate(state_dict["random"])
        self._past = Past(state_dict["last"], state_dict["count"])
        self._books.load_state_dict(state_dict["booked"])
        if state_dict["chooser"] is not None:
            self.chooser.load_state_dict(state_dict["chooser"])  # type: ignore[attr-defined]
