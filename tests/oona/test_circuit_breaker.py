"""Circuit breakers under a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ContractError
from esper.oona.breaker import POLICIES, BreakerPolicy, BreakerState, CircuitBreaker, Permit

POLICY = BreakerPolicy(failures=3, recovery=10, window=20, probe=5)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("test", POLICY, clock)


def permit(breaker: CircuitBreaker) -> Permit:
    given_permit = breaker.acquire()
    assert given_permit is not None
    return given_permit


def trip(breaker: CircuitBreaker) -> None:
    for _ in range(POLICY.failures):
        permit(breaker).failure()
    assert breaker.state is BreakerState.OPEN


def test_the_named_table_is_the_designs() -> None:
    assert {n: (p.failures, p.recovery) for n, p in POLICIES.items()} == {
        "tezzeret_compilation": (5, 60), "urabrask_validation": (3, 30), "urza_storage": (10, 120)
    }
    with pytest.raises(ContractError, match="urza_storage"):
        CircuitBreaker("unheard_of")


def test_failures_count_in_a_rolling_window_only(breaker: CircuitBreaker, clock: Clock) -> None:
    for clock.now in (0, 9, 18, 29, 38):  # never three within twenty seconds
        permit(breaker).failure()
        assert breaker.state is (BreakerState.CLOSED if clock.now != 18 else BreakerState.OPEN)
        if clock.now == 18:
            break
    breaker = CircuitBreaker("test", POLICY, clock)
    for clock.now in (0, 11, 22, 33, 44):
        permit(breaker).failure()
        permit(breaker).success()
    assert breaker.state is BreakerState.CLOSED


def test_an_open_breaker_gives_exactly_one_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    trip(breaker)
    assert breaker.acquire() is None and breaker.retry_after() == 10
    clock.now = 10
    probe = permit(breaker)
    assert breaker.state is BreakerState.HALF_OPEN and breaker.acquire() is None
    probe.success()
    assert breaker.state is BreakerState.CLOSED and breaker.retry_after() == 0
    permit(breaker).failure()
    assert breaker.state is BreakerState.CLOSED, "old failures are forgotten after recovery"


def test_a_failed_probe_opens_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    trip(breaker)
    clock.now = 12
    with pytest.raises(RuntimeError), permit(breaker):
        raise RuntimeError("still broken")
    assert breaker.state is BreakerState.OPEN and breaker.retry_after() == 10


def test_a_probe_that_hangs_counts_as_failed(breaker: CircuitBreaker, clock: Clock) -> None:
    trip(breaker)
    clock.now = 10
    hung = permit(breaker)
    clock.now = 15
    assert breaker.state is BreakerState.OPEN and breaker.retry_after() == 10
    hung.success()
    assert breaker.state is BreakerState.OPEN, "an answer after the deadline is no answer"
    clock.now = 25
    permit(breaker).success()
    assert breaker.state is BreakerState.CLOSED


def test_reports_from_before_it_opened_change_nothing(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    early = [permit(breaker) for _ in range(5)]
    trip(breaker)
    clock.now = 10
    probe = permit(breaker)
    for late in early:
        late.success()
    assert breaker.state is BreakerState.HALF_OPEN
    probe.failure()
    probe.success()  # a second report of one permit is ignored
    assert breaker.state is BreakerState.OPEN


@given(st.lists(st.one_of(st.integers(1, 12), st.sampled_from(["ask", "good", "bad"]))))
def test_whatever_happens_there_is_one_probe_and_none_before_recovery(
    steps: list[int | str],
) -> None:
    clock = Clock()
    breaker = CircuitBreaker("test", POLICY, clock)
    out: list[Permit] = []
    opened: float | None = None
    for step in steps:
        before = breaker.state
        if isinstance(step, int):
            clock.now += step
        elif step == "ask":
            got = breaker.acquire()
            if before is BreakerState.HALF_OPEN:
                assert got is None
            if before is BreakerState.OPEN:
                assert opened is not None
                assert (got is not None) == (clock.now >= opened + POLICY.recovery)
            if got is not None:
                out.append(got)
        elif out:
            (out.pop(0).success if step == "good" else out.pop(0).failure)()
        after = breaker.state
        if after is BreakerState.OPEN and before is not BreakerState.OPEN:
            # A hung probe fails at its deadline, which may lie before the step's end.
            opened = clock.now + breaker.retry_after() - POLICY.recovery
            if breaker.retry_after() == 0:
                opened = clock.now - POLICY.recovery
        if after is BreakerState.CLOSED:
            opened = None
