"""What the policy promises under any load, and whether it held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.leyline.events import Priority
from esper.oona.breaker import POLICIES
from esper.oona.load import Load
from esper.oona.queue import (
    AGEING_SECONDS,
    KARN_TO_TEZZERET,
    LIMITS,
    TEZZERET_TO_URABRASK,
)
from esper.oona.simulate import Replay, replay

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
OVERLOAD = 3.0
GOODPUT = 0.9  # of its peak, at OVERLOAD
# Service times scatter; a queue's worth of them may take so much longer than their mean.
SLACK = 1.5
_BREAKERS: Mapping[str, str] = {
    "compile": "tezzeret_compilation", "prove": "urabrask_validation", "store": "urza_storage",
}


@dataclass(frozen=True)
class Promise:
    """`evidence` says in figures why it was kept or not."""

    name: str
    kept: bool
    evidence: str


def replay_all(load: Load) -> dict[float, Replay]:
    """The load at each of `FACTORS`, by factor."""
    return {factor: replay(load, factor) for factor in FACTORS}


def background_bound(load: Load, factor: float) -> float | None:
    """Seconds that a background item may wait in all, None where there is no bound.

    Three steps of ageing take it to the top, where nothing but emergencies and what is older
    goes before it: at most the limits of both queues and what the workers hold, served at the
    pace of the slower stage in what emergencies leave of it. Outages stop the clock, and so
    do the recovery times of their breakers.
    """
    def pace(stage: str) -> float:
        given = load.stage(stage)
        return given.seconds * (1 + given.invalid) / given.workers

    slowest = max(pace("compile"), pace("prove"), load.store.seconds)
    emergencies = factor * slowest * sum(
        s.peak for s in load.arrivals if s.level is Priority.EMERGENCY
    )
    if emergencies >= 0.9:
        return None
    ahead = LIMITS[KARN_TO_TEZZERET] + LIMITS[TEZZERET_TO_URABRASK]
    ahead += load.compile.workers + load.prove.workers
    stopped = sum(
        60 * outage.minutes + 2 * POLICIES[_BREAKERS[outage.stage]].recovery
        for outage in load.outages
    )
    return 3 * AGEING_SECONDS + SLACK * ahead * slowest / (1 - emergencies) + stopped


def check(load: Load, replays: Mapping[float, Replay]) -> Sequence[Promise]:
    """The three promises, over all replays."""
    return _emergencies(replays), _background(load, replays), _goodput(replays)


def _emergencies(replays: Mapping[float, Replay]) -> Promise:
    tallies = [r.tallies[Priority.EMERGENCY] for r in replays.values()]
    lost = sum(t.refused + t.dropped + t.dropped_kernels + t.held_back for t in tallies)
    total = sum(t.arrived for t in tallies)
    return Promise("no emergency is dropped", not lost,
                   f"{lost} of {total:,} over all loads" if total else "none arrived")


def _background(load: Load, replays: Mapping[float, Replay]) -> Promise:
    name = "no background item starves"
    worst, said = -1.0, "none waited"
    for factor, result in replays.items():
        waited = result.longest_wait[Priority.BACKGROUND]
        bound = background_bound(load, factor)
        if bound is None:
            return Promise(name, False, f"at {factor:g} times the load emergencies alone take "
                           "all there is, so nothing bounds the wait of anybody else")
        if waited / bound > worst:
            worst = waited / bound
            said = (f"longest wait {waited / 60:.0f} min at {factor:g} times the load, "
                    f"where {bound / 60:.0f} min are the bound")
    return Promise(name, worst <= 1, said)


def _goodput(replays: Mapping[float, Replay]) -> Promise:
    peak = max(replays.values(), key=lambda r: r.goodput)
    over = replays[OVERLOAD]
    share = over.goodput / peak.goodput if peak.goodput else 0.0
    return Promise(
        f"goodput at {OVERLOAD:g} times the load is at least {GOODPUT:.0%} of its peak",
        share >= GOODPUT,
        f"{over.goodput:.1f} kernels an hour, {share:.0%} of the {peak.goodput:.1f} at "
        f"{peak.factor:g} times the load",
    )
