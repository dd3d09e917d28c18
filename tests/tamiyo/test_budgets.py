"""Budgets are kept, whatever is chosen, and what was not measured does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.budgets import Books, Budget, Costs, nearest
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.triggers import Schedule
from esper.tamiyo.twins import FixedSchedule, RandomTwin
from tests.tamiyo.states import (
    FLOPS,
    PARAMETERS,
    SIG,
    World,
    catalog,
    kernel,
    measurement,
    site,
    state,
)

MAP = SiteSignature(kind=SiteKind.MAP, channels=12)


def refusal(budget: Budget, spent: Costs, measured: bool = True) -> str:
    k = kernel("k", measured=(measurement(16, 8, 0.25, 3_000_000),) if measured else ())
    known = catalog(k)
    return Books(budget).refusal(k, site(), known.blueprints, spent)


NOTHING = Costs(0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("budget", "spent", "said"),
    [
        (Budget(parameters=162), NOTHING, ""),
        (Budget(parameters=1161), Costs(1000), "162 parameters, 161 left in the budget"),
        (Budget(flops=12_347), Costs(flops=12_000), "348 FLOPs, 347 left in the budget"),
        (Budget(flops=12_347), Costs(flops=90_000), "348 FLOPs, 0 left in the budget"),
        (Budget(flops=9000), Costs(),
         "FLOPs of the seeds there are is not known, and there is a budget of 9,000 FLOPs"),
        (Budget(latency_ms=1), Costs(latency_ms=0.8), "0.25 ms, 0.2 left in the budget"),
        (Budget(memory_mb=8), Costs(memory_mb=6), "3 MB, 2 left in the budget"),
        (Budget(parameters=900, memory_mb=2), NOTHING, "3 MB, 2 left in the budget"),
        (Budget(parameters=900, flops=900, latency_ms=1, memory_mb=4), NOTHING, ""),
    ],
)
def test_refusals_give_the_figures(budget: Budget, spent: Costs, said: str) -> None:
    assert refusal(budget, spent) == said


@pytest.mark.parametrize(
    ("budget", "said"),
    [(Budget(latency_ms=5), "latency not known, and there is a budget of 5 ms"),
     (Budget(memory_mb=5), "memory not known, and there is a budget of 5 MB")],
)
def test_what_was_not_measured_does_not_fit(budget: Budget, said: str) -> None:
    assert refusal(budget, NOTHING, measured=False) == said
    unplaced = site(positions=None)
    known = catalog(kernel("k"))
    assert Books(Budget(flops=10**9)).refusal(
        known.kernels[0], unplaced, known.blueprints, NOTHING).startswith("FLOPs not known")


def test_the_shape_with_the_nearest_number_of_rows_is_taken() -> None:
    shapes = tuple(measurement(b, s, b * s * s / 100, None) for b, s in ((4, 8), (16, 16)))
    k = kernel("k", MAP, measured=shapes)
    for positions, batch, expected in ((49, 4, 4), (49, 64, 16), (256, 8, 16), (None, 1, 16),
                                       (49, None, 16)):
        found = nearest(k, positions, batch)
        assert found is not None and found.batch == expected
    books = Books(Budget(batch_size=4))
    assert books.measured(k, site(signature=MAP, positions=(49, 49))) == (
        pytest.approx(2 * 2.56), None), "a module called twice runs its seed twice"


def test_a_kernel_still_being_loaded_has_its_share() -> None:
    k, books = kernel("k", measured=(measurement(16, 8, 0.25, 10**6),)), Books(Budget())
    known, now = catalog(k), state(1, site(), grown=5, grown_flops=7, seeds=frozenset())
    books.book("t", k, site(), now, known.blueprints)
    loading = state(2, site("a", SeedState.GERMINATED), grown=5, grown_flops=7,
                    seeds=frozenset({"t"}))
    assert books.spent(loading) == Costs(5 + PARAMETERS, 7 + FLOPS, pytest.approx(0.25), 1.0)
    loaded = state(3, site("a", SeedState.TRAINING), grown=167, grown_flops=355,
                   seeds=frozenset({"t", "of an older checkpoint"}))
    assert books.spent(loaded) == Costs(167, 355, None, None)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["heuristic", "random", "fixed"]), gain=st.sampled_from([0.1, -0.1]),
       parameters=st.none() | st.integers(1, 1500), latency=st.none() | st.floats(0.01, 3),
       max_active=st.integers(1, 3),
       ms=st.lists(st.none() | st.floats(0.01, 1), min_size=1, max_size=6))
def test_no_run_ever_exceeds_its_budget(
    kind: str, gain: float, parameters: int | None, latency: float | None, max_active: int,
    ms: list[float | None],
) -> None:
    kernels = tuple(
        kernel(f"k{i}", SIG, measured=() if m is None else (measurement(16, 8, m, 1),))
        for i, m in enumerate(ms))
    budget = Budget(parameters=parameters, latency_ms=latency)
    policy: HeuristicPolicy
    if kind == "heuristic":
        policy = HeuristicPolicy(Schedule(1, 1), budget=budget, max_active=max_active)
    elif kind == "random":
        policy = RandomTwin(40, like=Schedule(1, 1), budget=budget, max_active=max_active)
    else:
        policy = FixedSchedule(trigger=Schedule(1, 1), budget=budget, max_active=max_active)
    world = World((site("a"), site("b"), site("c")), catalog(*kernels), gain)
    for epoch in range(1, 41):
        world.run(policy, epoch, first=epoch)
        limits = {s.name: s for s in world.decisions[-1].budgets}
        if parameters is not None:
            assert world.cost("parameters") <= parameters
            assert limits["parameters"].limit == parameters
        if latency is not None:
            assert world.cost("latency") <= latency * (1 + 1e-9)
            spent = limits["latency"].spent
            assert spent is not None and spent <= latency * (1 + 1e-9)
