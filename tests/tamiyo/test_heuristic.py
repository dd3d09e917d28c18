"""The heuristic policy: when, where, which, and when to let go."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from esper.leyline.command import Action, FieldReport
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.budgets import Budget
from esper.tamiyo.care import Care
from esper.tamiyo.choice import Candidate
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SystemState
from esper.tamiyo.triggers import Schedule
from esper.tolaria.trees import pack, unpack
from tests.tamiyo.states import SIG, World, catalog, kernel, site, state


def growing(**more: Any) -> HeuristicPolicy:
    """At every epoch."""
    return HeuristicPolicy(Schedule(start=1, every=1), **more)


def test_schedule_starts_where_told_and_takes_the_site_with_the_most_signal() -> None:
    policy = HeuristicPolicy(Schedule(start=2, every=3))
    catalog = Catalog((kernel("k1"),))
    sites = (site("a", score=1.0), site("b", score=5.0))
    assert not policy.decide(state(1, *sites), catalog).commands
    (germination,) = policy.decide(state(2, *sites), catalog).commands
    assert (germination.action, germination.site, germination.kernel_id) == (
        Action.GERMINATE, "b", "k1")
    assert not policy.decide(state(4, *sites), catalog).commands
    assert policy.decide(state(5, *sites), catalog).commands


def test_load_on_the_slow_track_stretches_the_interval() -> None:
    policy, busy = HeuristicPolicy(Schedule(1, 2)), Catalog((kernel("k1"),), capacity=0.3)
    assert policy.decide(state(1, site()), busy).commands
    decisions = {e: policy.decide(state(e, site()), busy) for e in range(2, 12)}
    grown = [e for e, d in decisions.items() if d.commands]
    assert grown == [8], "ceil(2 / 0.3) = 7 epochs after the first"
    assert "slowed: capacity 0.3 makes 2 epochs 7" in decisions[8].commands[0].reason
    assert not decisions[2].put_off, "not due at any capacity"
    assert decisions[3].put_off == (
        "schedule: every 2 epochs from 1, but capacity 0.3 makes 2 epochs 7")


def test_budget_and_repeats_are_refused_with_their_figures() -> None:
    policy, catalog = growing(budget=Budget(parameters=200)), Catalog((kernel("k1"),))
    assert policy.decide(state(1, site()), catalog).commands  # 162 parameters
    policy = growing(budget=Budget(parameters=200))
    refused = policy.decide(state(1, site(), grown=100), catalog)
    assert not refused.commands
    assert refused.considered[0].reason == "162 parameters, 100 left in the budget"
    used = policy.decide(state(1, site(used_blueprints=frozenset({"bp-k1"}))), catalog)
    assert used.considered[0].reason == "tried here before"
    other = SiteSignature(kind=SiteKind.FEATURES, channels=24)
    assert not policy.decide(state(1, site()), Catalog((kernel("k2", other),))).considered


def test_kernels_without_the_wanted_tags_are_passed_over_by_name() -> None:
    wanted = growing(tags=("high_speed", "low_memory"))
    kernels = (kernel("fast", SIG, "high_speed"), kernel("both", SIG, "low_memory", "high_speed"))
    for order in (kernels, kernels[::-1]):
        decision = replace(wanted).decide(state(1, site()), Catalog(order))
        assert [c.kernel_id for c in decision.commands] == ["both"]
        reasons = {c.kernel_id: c.reason for c in decision.considered}
        assert reasons["fast"] == "not tagged low_memory"
    unmeasured = kernels[1].model_copy(update={"report": None})
    assert not replace(wanted).decide(state(1, site()), Catalog((unmeasured,))).commands


def test_what_paid_in_the_field_is_preferred() -> None:
    def report(name: str, gain: float, outcome: SeedState = SeedState.FOSSILIZED) -> FieldReport:
        return FieldReport(run_id="r", trace_id="t", site="a", kernel_id=name,
                           blueprint_id=f"bp-{name}", outcome=outcome, reason="", gain=gain,
                           loss_before=1.0, epochs=3)

    kernels = (kernel("bad"), kernel("good"))
    reports = (report("bad", 0.01, SeedState.CULLED), report("good", 0.2))
    (germination,) = growing().decide(
        state(1, site()), Catalog(kernels, reports)).commands
    assert germination.kernel_id == "good"


@pytest.mark.parametrize(
    ("at", "age", "gain", "expected"),
    [
        (SeedState.TRAINING, 1, 0.1, Action.ADVANCE),
        (SeedState.TRAINING, 1, -0.1, None),
        (SeedState.TRAINING, 3, -0.1, Action.CULL),
        (SeedState.TRAINING, 3, None, Action.CULL),
        (SeedState.TRAINING, 3, float("nan"), Action.CULL),
        (SeedState.GRAFTING, 9, None, None),
        (SeedState.STABILIZATION, 1, None, Action.ADVANCE),
        (SeedState.EVALUATING, 1, 0.1, Action.ADVANCE),
        (SeedState.EVALUATING, 1, None, Action.CULL),
        (SeedState.FINE_TUNING, 1, 0.1, Action.FOSSILIZE),
        (SeedState.FINE_TUNING, 1, -0.1, Action.CULL),
    ],
)
def test_seeds_move_on_by_their_counterfactual(
    at: SeedState, age: int, gain: float | None, expected: Action | None
) -> None:
    decision = HeuristicPolicy().decide(
        state(5, site("a", at, epochs_in_state=age, gain=gain), losses=(1.0, 1.0)), Catalog())
    assert [c.action for c in decision.commands] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("age", "losses", "expected"),
    [
        (1, (1.0, 0.95), Action.ADVANCE),
        (1, (1.0, 0.8), None),
        (1, (1.0, 1.3), None),
        (1, (1.0,), None),
        (1, (1.0, 1.2, 1.0, 1.2, 1.0, 1.3), Action.ADVANCE),  # this run is never quieter
        (6, (1.0, 1.3), Action.CULL),
        (6, (1.0, float("nan")), Action.CULL),
    ],
)
def test_a_seed_is_evaluated_when_the_loss_has_settled(
    age: int, losses: tuple[float, ...], expected: Action | None
) -> None:
    stabilizing = site("a", SeedState.STABILIZATION, epochs_in_state=age)
    decision = HeuristicPolicy().decide(state(5, stabilizing, losses=losses), Catalog())
    assert [c.action for c in decision.commands] == ([expected] if expected else [])


def test_evaluation_without_fine_tuning_ends_in_a_fossil() -> None:
    decision = HeuristicPolicy(care=Care(fine_tuning_epochs=0)).decide(
        state(5, site("a", SeedState.EVALUATING, epochs_in_state=1, gain=0.2)), Catalog())
    assert decision.commands[0].action is Action.FOSSILIZE


def test_the_chooser_decides_over_all_sites_and_kernels_and_remembers() -> None:
    class Contrary:
        def __init__(self) -> None:
            self.asked = 0

        def values(
            self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
        ) -> Sequence[tuple[float, str]]:
            self.asked += 1
            return [(-(c.site.score or 0) - c.parameters - (c.flops or math.inf), "the least")
                    if c.kernel.kernel_id != "never" else (-math.inf, "never")
                    for c in candidates]

        def state_dict(self) -> dict[str, Any]:
            return {"asked": self.asked}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.asked = state_dict["asked"]

    policy = growing(chooser=Contrary())
    sites = (site("a", score=1.0), site("b", score=5.0))
    known = catalog(kernel("never"), kernel("k1"))
    decision = policy.decide(state(1, *sites), known)
    assert [(c.site, c.kernel_id) for c in decision.commands] == [("a", "k1")]
    told = {(c.site, c.kernel_id): (c.chosen, c.reason) for c in decision.considered}
    assert told == {("a", "k1"): (True, "the least"), ("a", "never"): (False, "never"),
                    ("b", "k1"): (False, "the least")}, "all of one site, the best of the other"
    assert not policy.decide(state(2, *sites), catalog(kernel("never"))).commands
    again = growing(chooser=Contrary())
    again.load_state_dict(unpack(json.loads(json.dumps(pack(policy.state_dict(), {}))), {}))
    assert again.state_dict() == policy.state_dict() and again.chooser.asked == 2  # type: ignore[attr-defined]


def test_only_what_a_decision_looks_at_is_asked_for() -> None:
    """Scores where a seed could be put now; gains where they decide what becomes of a seed."""
    policy = HeuristicPolicy(Schedule(start=2, every=9), care=Care(fine_tuning_epochs=3))
    other = SiteSignature(kind=SiteKind.FEATURES, channels=24)
    sites = (site("a"), site("b"), site("spent", used_blueprints=frozenset({"bp-k"})),
             site("alien", signature=other))
    world = World(sites, catalog(kernel("k"))).run(policy, 10)
    assert world.grown[0][0] == 2
    asked = {e: w for e, w in enumerate(world.wanted, 1) if w}
    (name,) = {s for e, s, _ in world.grown}
    # Germinated 2, learned 3, blended in and settled 4, evaluated 5, tuned 6 to 8.
    assert asked == {2: {"a", "b"}, 3: {name}, 5: {name}, 8: {name}}
    assert world.sites[name].fossils == 1
    nothing_fits = growing(budget=Budget(parameters=100))
    assert not nothing_fits.wants(state(1, *sites), catalog(kernel("k")))


def test_a_run_that_goes_on_grows_as_if_it_had_not_stopped() -> None:
    def fresh() -> tuple[HeuristicPolicy, World]:
        return (growing(budget=Budget(parameters=700), max_active=2),
                World((site("a"), site("b"), site("c")),
                      catalog(*(kernel(f"k{i}") for i in range(9)))))

    policy, world = fresh()
    world.run(policy, 30)
    first, interrupted = fresh()
    interrupted.run(first, 11)
    second, _ = fresh()
    second.load_state_dict(first.state_dict())
    interrupted.run(second, 30, first=12)
    assert interrupted.grown == world.grown and len(world.grown) == 4
