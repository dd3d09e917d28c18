"""A load to replay: who offers how much and when, how fast each stage works, what breaks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from esper.leyline.base import Contract
from esper.leyline.events import Priority

MAX_ARRIVALS = 100_000


class Burst(Contract):
    """`per_hour` more arrivals an hour, from `at_minute` on, for so many `minutes`."""

    at_minute: float = Field(ge=0)
    minutes: float = Field(gt=0)
    per_hour: float = Field(gt=0)


class Arrivals(Contract):
    """One stream of blueprints: `per_hour` of them at random moments (a Poisson process).

    `interest` is drawn evenly from a range; NORMAL work above 0.8 counts as strategic. A
    stream that `heeds_capacity` holds back all but the share that the capacity factor leaves,
    as Karn and Tamiyo do; the others do not care.
    """

    name: str = Field(min_length=1)
    priority: Literal["emergency", "strategic", "normal", "experimental", "background"]
    per_hour: float = Field(ge=0)
    interest: tuple[float, float] = (0.5, 0.5)
    heeds_capacity: bool = False
    bursts: tuple[Burst, ...] = ()

    @model_validator(mode="after")
    def _range(self) -> Arrivals:
        low, high = self.interest
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interest is a range within 0 and 1, lowest first, not {low}, {high}")
        return self

    @property
    def level(self) -> Priority:
        return Priority[self.priority.upper()]

    def rate(self, seconds: float) -> float:
        """Arrivals a second at a moment, in seconds from the start."""
        minute = seconds / 60
        more = sum(
            b.per_hour for b in self.bursts if b.at_minute <= minute < b.at_minute + b.minutes
        )
        return (self.per_hour + more) / 3600

    @property
    def peak(self) -> float:
        """No moment's rate is above this, in arrivals a second."""
        return (self.per_hour + sum(b.per_hour for b in self.bursts)) / 3600


class Stage(Contract):
    """How fast a service works: `seconds` an item on average, with a standard deviation of
    `spread` times that. `invalid` is the share of items that fail by their own fault."""

    workers: int = Field(default=1, ge=1, le=1000)
    seconds: float = Field(gt=0)
    spread: float = Field(default=0.3, ge=0, le=3)
    invalid: float = Field(default=0.0, ge=0, lt=1)


class Outage(Contract):
    """A time in which a stage fails whatever it is given; `hangs` lets it not even answer."""

    stage: Literal["compile", "prove", "store"]
    at_minute: float = Field(ge=0)
    minutes: float = Field(gt=0)
    hangs: bool = False


class Load(Contract):
    """What `esper simulate` replays. After `hours` nothing more arrives and the queues drain."""

    name: str = Field(min_length=1)
    hours: float = Field(gt=0, le=240)
    seed: int = Field(default=0, ge=0, lt=2**32)
    arrivals: tuple[Arrivals, ...] = Field(min_length=1)
    compile: Stage
    prove: Stage
    store: Stage = Stage(seconds=0.05)
    outages: tuple[Outage, ...] = ()

    @model_validator(mode="after")
    def _of_a_size(self) -> Load:
        expected = 0.0
        for stream in self.arrivals:
            expected += stream.per_hour * self.hours
            expected += sum(b.per_hour * b.minutes / 60 for b in stream.bursts)
        if not 0 < expected <= MAX_ARRIVALS:
            raise ValueError(
                f"about {expected:,.0f} blueprints would arrive; between 1 and {MAX_ARRIVALS:,} "
                "can be replayed, so change the rates or the hours"
            )
        return self

    def stage(self, name: str) -> Stage:
        return {"compile": self.compile, "prove": self.prove, "store": self.store}[name]
