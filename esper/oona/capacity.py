"""How much the slow track can take, as one number that Tamiyo multiplies her plans with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import MappingProxyType

from esper.errors import ContractError
from esper.leyline.events import Event, Topic
from esper.leyline.library import QueueDepths
from esper.oona.queue import LIMITS


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
        return Event(topic=Topic.CAPACITY, sender=sender, body=asdict(self))


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
