"""The admission policy: pure and queued forms agree, and neither ever breaks its promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ContractError
from esper.leyline.events import Priority
from esper.leyline.library import QueueDepths
from esper.oona.capacity import Level, capacity
from esper.oona.queue import LIMITS, BoundedQueue, Decision, Item, admit, aged, lifted, rank

PRIORITIES = st.sampled_from(Priority)
# What happens to a queue: time passes (whole seconds, so that ages are exact), an arrival, a pop.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(0, 700)),
        st.tuples(st.just("offer"), PRIORITIES, st.sampled_from([0.0, 0.5, 1.0]),
                  st.sampled_from([0, 400])),
        st.tuples(st.sampled_from(["pop", "pop and put back"])),
    ),
    max_size=60,
)


@given(limit=st.integers(1, 5), steps=STEPS)
def test_a_bounded_queue_does_what_the_pure_policy_says(
    limit: int, steps: list[tuple[object, ...]]
) -> None:
    now = 0.0
    queue: BoundedQueue[int] = BoundedQueue(limit, lambda: now)
    model: dict[int, Item[int]] = {}
    for serial, step in enumerate(steps):
        if step[0] == "wait":
            now += step[1]  # type: ignore[operator]
        elif step[0] == "offer":
            arrival = Item(serial, step[1], now - step[3], step[2])  # type: ignore[arg-type,operator]
            expected = admit(list(model.values()), arrival, limit, now)
            given_answer = queue.offer(
                serial, arrival.priority, arrival.interest, arrival.since)
            assert given_answer.decision is expected.decision
            if expected.decision is Decision.REFUSED:
                assert given_answer.reason and not given_answer.accepted
                continue
            if given_answer.dropped is not None:
                # Items of equal rank may be told apart by serial number only in the queue.
                dropped = model.pop(given_answer.dropped)
                assert dropped.priority is not Priority.EMERGENCY
                assert rank(dropped, now) == max(rank(i, now) for i in [*model.values(), dropped])
                assert aged(dropped.priority, now - dropped.since) > aged(
                    arrival.priority, now - arrival.since)
            model[serial] = arrival
        else:
            popped = queue.pop()
            assert (popped is None) == (not model)
            if popped is not None:
                item = model.pop(popped)
                assert all(rank(item, now) <= rank(i, now) for i in model.values())
                if step[0] == "pop and put back":
                    queue.put_back(item)
                    model[popped] = item
        assert len(queue) == len(model)
        ordinary = [i for i in model.values() if i.priority is not Priority.EMERGENCY]
        assert len(ordinary) <= limit
        assert len(model) <= limit or not ordinary, "only emergencies may exceed the limit"


@given(arrivals=st.lists(PRIORITIES, max_size=80))
def test_no_emergency_is_refused_or_dropped(arrivals: list[Priority]) -> None:
    queue: BoundedQueue[tuple[int, Priority]] = BoundedQueue(3, lambda: 0.0)
    for n, priority in enumerate(arrivals):
        admission = queue.offer((n, priority), priority)
        assert admission.accepted or priority is not Priority.EMERGENCY
    served = list(iter(queue.pop, None))
    wanted = [n for n, p in enumerate(arrivals) if p is Priority.EMERGENCY]
    assert [item[0] for item in served if item and item[1] is Priority.EMERGENCY] == wanted


@given(PRIORITIES, st.floats(0, 1e5), st.floats(0, 1e5))
def test_ageing_rises_monotonically_and_never_to_emergency(
    priority: Priority, a: float, b: float
) -> None:
    early, late = sorted((a, b))
    assert aged(priority, late) <= aged(priority, early) <= priority
    assert aged(priority, late) >= min(priority, Priority.STRATEGIC)


@given(st.lists(st.lists(st.tuples(st.sampled_from(list(Priority)[1:]),
                                   st.sampled_from([0.0, 0.5, 1.0])), max_size=2),
                min_size=1, max_size=4))
def test_whatever_else_arrives_an_item_is_served_or_dropped_in_bounded_time(
    pattern: list[list[tuple[Priority, float]]],
) -> None:
    """Every half minute the next arrivals of a repeated pattern, and one item is served."""
    pace, limit, now = 30.0, 4, 0.0
    queue: BoundedQueue[int] = BoundedQueue(limit, lambda: now)
    waiting: dict[int, float] = {}
    for serial in range(120):
        now = serial * pace
        for i, (priority, interest) in enumerate(pattern[serial % len(pattern)]):
            admission = queue.offer(2 * serial + i, priority, interest)
            if admission.accepted:
                waiting[2 * serial + i] = now
            if admission.dropped is not None:
                del waiting[admission.dropped]
        served = queue.pop()
        if served is not None:
            del waiting[served]
        # Three steps of ageing to the top, then at most a whole queue is ahead.
        assert all(now - since <= 3 * 300 + limit * pace for since in waiting.values())


def test_ageing_takes_five_minutes_a_level() -> None:
    levels = [aged(Priority.BACKGROUND, s) for s in (0, 299, 300, 600, 900, 1e6)]
    assert levels == [4, 4, 3, 2, 1, 1]
    assert aged(Priority.BACKGROUND, -50) == 4, "a clock that was set back makes nobody older"


def test_an_old_background_item_is_served_and_kept_before_a_young_normal_one() -> None:
    clock: Iterator[float] = iter([0.0, 900.0, 900.0, 900.0])
    queue: BoundedQueue[str] = BoundedQueue(2, lambda: next(clock))
    queue.offer("old", Priority.BACKGROUND)
    queue.offer("young", Priority.NORMAL)
    assert queue.offer("urgent", Priority.STRATEGIC).dropped == "young"
    assert queue.pop() == "old"


def test_interest_lifts_normal_work_only() -> None:
    assert lifted(Priority.NORMAL, 0.81) is Priority.STRATEGIC
    assert lifted(Priority.NORMAL, 0.8) is Priority.NORMAL
    assert lifted(Priority.BACKGROUND, 1.0) is Priority.BACKGROUND


def test_a_queue_for_nothing_is_refused() -> None:
    with pytest.raises(ContractError, match="limit 0"):
        BoundedQueue(0)


@pytest.mark.parametrize(
    ("waiting", "level", "factor"),
    [(0, Level.NORMAL, 1.0), (50, Level.NORMAL, 1.0), (51, Level.DEGRADED, 0.7),
     (70, Level.DEGRADED, 0.7), (71, Level.OVERLOADED, 0.3), (90, Level.OVERLOADED, 0.3),
     (91, Level.EMERGENCY, 0.1), (130, Level.EMERGENCY, 0.1)],
)
def test_capacity_follows_the_fullest_queue(waiting: int, level: Level, factor: float) -> None:
    depths = QueueDepths(karn_to_tezzeret=waiting, tezzeret_to_urabrask=0, urabrask_validation=0,
                         urza_storage=0)
    now = capacity(depths)
    assert (now.level, now.factor, now.fill) == (level, factor, waiting / 100)
    assert now.event("urza").body["factor"] == factor
    assert LIMITS.keys() == depths.model_dump().keys()
