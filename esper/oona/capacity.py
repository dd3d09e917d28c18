"""How much the slow track can take, as one number that Tamiyo multiplies her plans with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Self

from esper.errors import ContractError
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import QueueDepths
from esper.oona.queue import LIMITS

log = logging.getLogger(__name__)


class Level(StrEnum):
    NORMAL = "normal"
    DEGRADED = "degraded"
    OVERLOADED = "overloaded"
    EMERGENCY = "emergency"


FACTORS: Mapping[Level, float] = MappingProxyType(
    {Level.NORMAL: 1.0, Level.DEGRADED: 0.7, Level.OVERLOADED: 0.3, Level.EMERGENCY: 0.1}
)
_ABOVE = ((0.9, Level.EMERGENCY), (0.7, Level.OVERLOADED), (0.5, Level.DEGRADED))


@dataclass(frozen=True, slots=True)
class Capacity:
    """`fill` is how full the fullest queue is: 1.0 at its limit, more with emergencies in it."""

    level: Level
    factor: float
    queue: str
    fill: float

    def event(self, sender: str) -> Event:
        """The announcement of this capacity to Tamiyo."""
        return Event(
            topic=Topic.CAPACITY, sender=sender, priority=Priority.STRATEGIC, body=asdict(self)
        )


def capacity(depths: QueueDepths, limits: Mapping[str, int] = LIMITS) -> Capacity:
    """The capacity that the fullest queue leaves.

    Raises:
        ContractError: a queue of `depths` has no limit.
    """
    waiting: dict[str, int] = depths.model_dump()
    if unknown := waiting.keys() - limits.keys():
        raise ContractError(
            f"no limit is known for {sorted(unknown)}; the table has {sorted(limits)}"
        )
    queue = max(waiting, key=lambda name: waiting[name] / limits[name])
    fill = waiting[queue] / limits[queue]
    level = next((level for above, level in _ABOVE if fill > above), Level.NORMAL)
    return Capacity(level, FACTORS[level], queue, fill)


class CapacityWatch:
    """Publishes the capacity on system.capacity.updates, at first and whenever its level
    changes; a context manager that looks every `period` seconds from a thread of its own.

    Any process may fill the queues, so looking is the only way to know; one look is a query.

    Args:
        depths: the library's.
        publish: what takes the event, such as `Bus.publish`.
    """

    def __init__(
        self,
        depths: Callable[[], QueueDepths],
        publish: Callable[[Event], object],
        *,
        sender: str = "urza",
        period: float = 1.0,
    ) -> None:
        self._depths, self._publish, self._sender = depths, publish, sender
        self._period = period
        self._known: Level | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> Capacity:
        """Look now, and publish what has changed."""
        now = capacity(self._depths())
        if now.level is not self._known:
            self._known = now.level
            self._publish(now.event(self._sender))
        return now

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:
                log.warning("the capacity is not known", exc_info=True)
            self._stop.wait(self._period)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="oona-capacity", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
