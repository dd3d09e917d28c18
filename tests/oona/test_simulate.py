"""The simulator keeps its books, and its promises are ones that a bad policy breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.leyline.events import Priority
from esper.oona import queue, simulate
from esper.oona.load import Load
from esper.oona.promises import FACTORS, background_bound, check, replay_all
from esper.oona.simulate import Replay, replay


def stream(priority: str, per_hour: float, **more: Any) -> dict[str, Any]:
    return {"name": priority, "priority": priority, "per_hour": per_hour, **more}


def load(*arrivals: dict[str, Any], **more: Any) -> Load:
    given_load = {"name": "test", "hours": 4, "arrivals": arrivals,
                  "compile": {"seconds": 10, "workers": 2}, "prove": {"seconds": 20}, **more}
    return Load.model_validate(given_load)


LOADS = st.builds(
    load,
    *(st.builds(stream, st.just(p.name.lower()), st.sampled_from([0.0, 5.0, 60.0, 400.0]),
                interest=st.sampled_from([(0.0, 1.0), (0.9, 0.9)]), heeds_capacity=st.booleans())
      for p in list(Priority)[1:]),
    st.just(stream("emergency", 7)),
    hours=st.just(1.0), seed=st.integers(0, 99),
    compile=st.fixed_dictionaries({"seconds": st.sampled_from([5, 60]),
                                   "workers": st.integers(1, 3),
                                   "invalid": st.sampled_from([0.0, 0.3])}),
    outages=st.lists(st.fixed_dictionaries({
        "stage": st.sampled_from(["compile", "prove", "store"]),
        "at_minute": st.integers(0, 60), "minutes": st.sampled_from([1, 20]),
        "hangs": st.booleans()}), max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(LOADS)
def test_every_arrival_is_accounted_for_once_and_no_emergency_is_lost(some: Load) -> None:
    result = replay(some, 2.0)
    for priority, t in result.tallies.items():
        ends = t.held_back + t.refused + t.dropped + t.invalid + t.validated + t.left_over
        assert ends == t.arrived, priority
        assert len(t.waits) == t.invalid + t.validated
        assert not t.left_over, "outages end, so everything that was let in is done in the end"
    emergencies = result.tallies[Priority.EMERGENCY]
    assert emergencies.invalid + emergencies.validated == emergencies.arrived
    depths = [s.depths for s in result.samples]
    assert len(depths) == simulate.SAMPLES + 1
    assert max(d.urabrask_validation for d in depths) <= some.prove.workers


def test_the_same_seed_gives_the_same_result_and_another_another() -> None:
    some = load(stream("normal", 120), stream("background", 60))
    assert replay(some) == replay(some)
    assert replay(some) != replay(some.model_copy(update={"seed": 1}))


HEAVY = load(stream("normal", 150, interest=[0.81, 1.0]), stream("experimental", 40),
             stream("background", 25), stream("emergency", 3), hours=8)


def kept(some: Load, replays: Mapping[float, Replay] | None = None) -> list[bool]:
    return [p.kept for p in check(some, replays or replay_all(some))]


def test_the_promises_hold_where_nobody_gives_way() -> None:
    assert kept(HEAVY) == [True, True, True]


def test_old_items_behind_interesting_ones_break_the_second_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue, "_pull", lambda level, interest: -interest)
    assert kept(HEAVY) == [True, False, True]


def test_kernels_that_wait_aside_for_a_calm_break_the_second_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulate, "may_return", lambda item, n, limit, now: n < limit // 2)
    assert kept(load(stream("normal", 100), stream("background", 30), stream("emergency", 20),
                     hours=3)) == [True, False, True]


def test_an_emergency_held_back_and_a_collapse_break_the_others() -> None:
    shy = load(stream("normal", 300), stream("emergency", 60, heeds_capacity=True))
    assert kept(shy)[0] is False
    flooded = load(stream("emergency", 150), stream("background", 10))
    assert background_bound(flooded, 3.0) is None and kept(flooded)[1] is False
    replays = {f: Replay(f, goodput=100.0) for f in FACTORS}
    assert kept(HEAVY, replays)[2]
    replays[3.0] = replace(replays[3.0], goodput=89.0)
    assert not kept(HEAVY, replays)[2]


def test_an_outage_opens_the_breaker_and_costs_no_item() -> None:
    some = load(stream("normal", 60), outages=[{"stage": "prove", "at_minute": 60, "minutes": 30}])
    result = replay(some)
    assert result.tallies[Priority.NORMAL].invalid == 0
    during = [s for s in result.samples if 3700 < s.time < 5400]
    assert all(s.open_breakers == ("prove",) for s in during)
    # Three failures open it; then one probe after each recovery of 30 s and its own 20 s.
    assert 3 + 25 < result.faults < 3 + 45
    hung = replay(some.model_copy(
        update={"outages": (some.outages[0].model_copy(update={"hangs": True}),)}))
    assert hung.faults == 1, "the only prover hangs, and nothing else is tried"
    after = [s.depths.tezzeret_to_urabrask for s in result.samples]
    assert max(after) > 20 and after[-1] < 5


def test_producers_that_heed_the_capacity_are_turned_away_less() -> None:
    deaf = replay(load(stream("experimental", 400)))
    wise = replay(load(stream("experimental", 400, heeds_capacity=True)))
    lost = [t.refused + t.dropped for r in (deaf, wise)
            if (t := r.tallies[Priority.EXPERIMENTAL])]
    assert lost[1] < lost[0] / 10
    assert wise.goodput > 0.97 * deaf.goodput, "and as much gets done"


def test_a_load_too_large_to_replay_is_refused_with_its_size() -> None:
    with pytest.raises(ValidationError, match="about 8,000,000 blueprints"):
        load(stream("normal", 2_000_000))
