"""Admission to bounded queues: who gets in, who makes room, who is turned away.

What waits where: blueprints to be compiled in karn_to_tezzeret, kernels to be proved in
tezzeret_to_urabrask. The other two count work under way, which nobody drops: kernels being
proved in urabrask_validation, artifacts being written in urza_storage; full, they turn away
whatever is no emergency.

The policy is section 6.3 of the design. It is written twice on purpose: `admit` is the
policy itself, a pure function over any collection of waiting items (Urza calls it on rows of
its database), and `BoundedQueue` is the same policy with every step in logarithmic time. A
property test holds the two together.

One order serves both ends. `rank` sorts items by aged priority, then by interest (more
first), then by age (older first). The first of that order is served next, the last of it is
dropped when room must be made: what is shed is what would have been served last.

Nobody starves: an item leaves every level but the topmost by rising after five minutes, and
among those that can rise no further age alone counts. Were it interest there too, a stream of
interesting arrivals would keep an old background item waiting for ever.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from types import MappingProxyType
from typing import Generic, TypeVar

from esper.errors import ContractError
from esper.leyline.events import Priority

KARN_TO_TEZZERET = "karn_to_tezzeret"
TEZZERET_TO_URABRASK = "tezzeret_to_urabrask"
URABRASK_VALIDATION = "urabrask_validation"
URZA_STORAGE = "urza_storage"

LIMITS: Mapping[str, int] = MappingProxyType(
    {
        KARN_TO_TEZZERET: 100,
        TEZZERET_TO_URABRASK: 50,
        URABRASK_VALIDATION: 25,
        URZA_STORAGE: 200,
    }
)
AGEING_SECONDS = 300.0
STRATEGIC_INTEREST = 0.8
# Leases that may expire on one item. A machine that goes down takes leases of innocent items
# with it, so one is too few; each costs a worker and a minute, so many are too many.
MAX_ATTEMPTS = 5

T = TypeVar("T")


class Decision(StrEnum):
    """What became of an arrival."""

    ACCEPTED = "ACCEPTED"
    DISPLACED = "DISPLACED"  # accepted, and a waiting item was dropped for it
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """A waiting item as the policy sees it. `since` is when it arrived, in seconds."""

    key: T
    priority: Priority
    since: float
    interest: float = 0.5


@dataclass(frozen=True, slots=True)
class Admission(Generic[T]):
    """The answer to a producer. `dropped` is the key that made room, None where none had to."""

    decision: Decision
    dropped: T | None = None
    reason: str = ""

    @property
    def accepted(self) -> bool:
        return self.decision is not Decision.REFUSED


def lifted(priority: Priority, interest: float) -> Priority:
    """The priority of an arrival: NORMAL work of interest above 0.8 is STRATEGIC.

    Work that its producer calls experimental or background stays that, however interesting:
    a recompilation of a popular kernel must not overtake a first compilation.
    """
    if priority is Priority.NORMAL and interest > STRATEGIC_INTEREST:
        return Priority.STRATEGIC
    return priority


def aged(priority: int, waited: float) -> int:
    """The level after `waited` seconds: one higher per five minutes, but never emergency."""
    if priority == Priority.EMERGENCY:
        return priority
    return max(int(Priority.STRATEGIC), priority - int(max(0.0, waited) // AGEING_SECONDS))


def rank(item: Item[T], now: float) -> tuple[int, float, float]:
    """Sort key: the smallest is served next, the largest is dropped first."""
    level = aged(item.priority, now - item.since)
    return level, _pull(level, item.interest), item.since


def _pull(level: int, interest: float) -> float:
    """How interest sorts within a level: not at all where nobody rises any further."""
    return -interest if level > Priority.STRATEGIC else 0.0


def may_return(item: Item[T], waiting: int, limit: int, now: float) -> bool:
    """Whether work that was dropped from a queue, and kept, may go back into it.

    It may while the queue is less than half full, where it neither stands in the way of an
    arrival nor lowers the capacity factor; and once it has risen to the top it may take any
    free place, for nothing but an emergency can drop it then. (Earlier it would only be
    dropped again, and later it would starve under a load that never ends.)
    """
    at_the_top = aged(item.priority, now - item.since) <= Priority.STRATEGIC
    return waiting < (limit if at_the_top else limit // 2)


def _refusal(limit: int, level: int) -> str:
    return (
        f"the queue is full ({limit} items) and none of them has a lower priority than "
        f"{Priority(level).name}; offer it again when the queue has drained"
    )


def _displacement(level: int, arrival: int) -> str:
    return (
        f"dropped at level {level} from a full queue for an arrival of priority "
        f"{Priority(arrival).name}"
    )


def admit(waiting: Collection[Item[T]], arrival: Item[T], limit: int, now: float) -> Admission[T]:
    """Decide on one arrival. Nothing is changed; the caller acts on the answer.

    A queue can hold more than `limit` items: emergencies are always accepted, and a lease
    that expires brings an admitted item back. It then refuses or trades one for one. An arrival
    that is old already, because it waited in the queue before this one, comes at its aged
    priority.
    """
    if len(waiting) < limit:
        return Admission(Decision.ACCEPTED)
    comes_at = aged(arrival.priority, now - arrival.since)
    droppable = [i for i in waiting if i.priority != Priority.EMERGENCY]
    if droppable:
        victim = max(droppable, key=lambda i: rank(i, now))
        level = aged(victim.priority, now - victim.since)
        if comes_at < level:
            return Admission(Decision.DISPLACED, victim.key, _displacement(level, comes_at))
    if arrival.priority == Priority.EMERGENCY:
        return Admission(Decision.ACCEPTED)
    return Admission(Decision.REFUSED, reason=_refusal(limit, comes_at))


_Entry = tuple[float, float, int, T]  # as `rank` has it, then serial number, value


class BoundedQueue(Generic[T]):
    """A queue under the policy of `admit`. Not thread-safe: the owner holds a lock.

    `_levels[n]` is sorted and holds the items whose aged priority is n. `_ageing` is a heap
    of the moments at which an item rises; entries whose item is gone or has moved are
    recognised by `_level_of` and skipped.

    Args:
        limit: how many items fit, emergencies beyond it not counted.
        clock: seconds, never going backwards.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        if limit < 1:
            raise ContractError(f"a queue holds at least 1 item, given limit {limit}")
        self.limit = limit
        self._clock = clock
        self._levels: list[list[_Entry[T]]] = [[] for _ in Priority]
        self._level_of: dict[int, int] = {}
        self._ageing: list[tuple[float, int, int, _Entry[T]]] = []
        self._serial = count()

    def __len__(self) -> int:
        return len(self._level_of)

    def offer(
        self, value: T, priority: Priority, interest: float = 0.5, since: float | None = None
    ) -> Admission[T]:
        """Admit `value` or refuse it; `Admission.dropped` is the value that made room.

        `since` is when its waiting began, for what waited elsewhere before; by default now.
        """
        now = self._clock()
        self._rise(now)
        item = Item(value, priority, now if since is None else since, interest)
        comes_at = aged(priority, now - item.since)
        admission: Admission[T] = Admission(Decision.ACCEPTED)
        if len(self._level_of) >= self.limit:
            level = next((n for n in range(len(Priority) - 1, 0, -1) if self._levels[n]), 0)
            if comes_at < level:
                *_, serial, dropped = self._levels[level].pop()
                del self._level_of[serial]
                admission = Admission(Decision.DISPLACED, dropped, _displacement(level, comes_at))
            elif priority != Priority.EMERGENCY:
                return Admission(Decision.REFUSED, reason=_refusal(self.limit, comes_at))
        self._place_aged(item, comes_at)
        return admission

    def put_back(self, item: Item[T]) -> None:
        """Return an item that was admitted before, at the age it has, even to a full queue."""
        now = self._clock()
        self._rise(now)
        self._place_aged(item, aged(item.priority, now - item.since))

    def pop(self) -> T | None:
        """Take the item that is first in rank, or None where nothing waits."""
        self._rise(self._clock())
        for level in self._levels:
            if level:
                *_, serial, value = level.pop(0)
                del self._level_of[serial]
                return value
        return None

    def _place_aged(self, item: Item[T], level: int) -> None:
        entry = (_pull(level, item.interest), item.since, next(self._serial), item.key)
        risen = int(item.priority) - level
        self._place(entry, level, item.since + risen * AGEING_SECONDS)

    def _place(self, entry: _Entry[T], level: int, since: float) -> None:
        """Put an entry onto a level that it reached at `since`."""
        serial = entry[2]
        insort(self._levels[level], entry)
        self._level_of[serial] = level
        if level > Priority.STRATEGIC:
            heapq.heappush(self._ageing, (since + AGEING_SECONDS, serial, level, entry))

    def _rise(self, now: float) -> None:
        if len(self._ageing) > 2 * len(self._level_of) + 64:
            # Items that were served long before they aged would pile up for five minutes.
            self._ageing = [a for a in self._ageing if self._level_of.get(a[1]) == a[2]]
            heapq.heapify(self._ageing)
        while self._ageing and self._ageing[0][0] <= now:
            due, serial, level, entry = heapq.heappop(self._ageing)
            if self._level_of.get(serial) == level:
                del self._levels[level][bisect_left(self._levels[level], entry)]
                pull = entry[0] if level - 1 > Priority.STRATEGIC else 0.0
                self._place((pull, *entry[1:]), level - 1, due)
