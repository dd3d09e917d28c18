"""The heuristic policy: when, where, which, and when to let go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.leyline.artifact import Manifest
from esper.leyline.command import Action, FieldReport
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import Tag, ValidationReport
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SiteStatus, SystemState
from tests.support import bottleneck, opened

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=12)


def kernel(name: str, signature: SiteSignature = SIG, *tags: str) -> KernelRecord:
    report = ValidationReport(
        kernel_id=name, accepted=True, seconds=0,
        tags=tuple(Tag(name=tag, evidence="test", value=1) for tag in tags))
    ir = bottleneck(signature.kind)
    manifest: Manifest = opened(ir, signature).manifest.model_copy(update={"kernel_id": name})
    return KernelRecord(kernel_id=name, blueprint_id=f"bp-{name}", manifest=manifest,
                        digest="0" * 64, size=1, status=KernelStatus.VALIDATED, created=0,
                        updated=0, report=report)


def state(epoch: int, *sites: SiteStatus, losses: tuple[float, ...] = (1.0,),
          grown: int = 0) -> SystemState:
    return SystemState(epoch, losses, losses, sites, grown, 0)


def site(name: str = "a", at: SeedState = SeedState.DORMANT, **more: object) -> SiteStatus:
    status = SiteStatus(name, SIG, at)
    if at is not SeedState.DORMANT:
        status = replace(status, kernel_id="k", trace_id="t")
    return replace(status, **more)  # type: ignore[arg-type]


def test_schedule_starts_where_told_and_takes_the_site_with_the_most_signal() -> None:
    policy = HeuristicPolicy(start=2, every=3)
    catalog = Catalog((kernel("k1"),))
    sites = (site("a", score=1.0), site("b", score=5.0))
    assert not policy.decide(state(1, *sites), catalog).commands
    (germination,) = policy.decide(state(2, *sites), catalog).commands
    assert (germination.action, germination.site, germination.kernel_id) == (
        Action.GERMINATE, "b", "k1")
    assert not policy.decide(state(4, *sites), catalog).commands
    assert policy.decide(state(5, *sites), catalog).commands


def test_load_on_the_slow_track_stretches_the_interval() -> None:
    policy, busy = HeuristicPolicy(start=1, every=2), Catalog((kernel("k1"),), capacity=0.3)
    assert policy.decide(state(1, site()), busy).commands
    decisions = {e: policy.decide(state(e, site()), busy) for e in range(2, 12)}
    grown = [e for e, d in decisions.items() if d.commands]
    assert grown == [8], "ceil(2 / 0.3) = 7 epochs after the first"
    assert "slowed: capacity 0.3 makes 2 epochs 7" in decisions[8].commands[0].reason
    assert not decisions[2].put_off, "not due at any capacity"
    assert decisions[3].put_off == (
        "schedule: every 2 epochs from 1, but capacity 0.3 makes 2 epochs 7")


def test_plateau_waits_for_one() -> None:
    policy, catalog = HeuristicPolicy(trigger="plateau", patience=2), Catalog((kernel("k1"),))
    falling = (1.0, 0.8, 0.6, 0.4)
    assert not policy.decide(state(4, site(), losses=falling), catalog).commands
    flat = (1.0, 0.6, 0.599, 0.598)
    (germination,) = policy.decide(state(4, site(), losses=flat), catalog).commands
    assert "plateau" in germination.reason


def test_budget_and_repeats_are_refused_with_their_figures() -> None:
    policy, catalog = HeuristicPolicy(start=1, max_parameters=200), Catalog((kernel("k1"),))
    assert policy.decide(state(1, site()), catalog).commands  # 162 parameters
    policy = HeuristicPolicy(start=1, max_parameters=200)
    refused = policy.decide(state(1, site(), grown=100), catalog)
    assert not refused.commands
    assert refused.considered[0].reason == "162 parameters, 100 left in the budget"
    used = policy.decide(state(1, site(used_blueprints=frozenset({"bp-k1"}))), catalog)
    assert used.considered[0].reason == "tried here before"
    other = SiteSignature(kind=SiteKind.FEATURES, channels=24)
    assert not policy.decide(state(1, site()), Catalog((kernel("k2", other),))).considered


def test_kernels_without_the_wanted_tags_are_passed_over_by_name() -> None:
    wanted = HeuristicPolicy(start=1, tags=("high_speed", "low_memory"))
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
    (germination,) = HeuristicPolicy(start=1).decide(
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
    decision = HeuristicPolicy(fine_tuning_epochs=0).decide(
        state(5, site("a", SeedState.EVALUATING, epochs_in_state=1, gain=0.2)), Catalog())
    assert decision.commands[0].action is Action.FOSSILIZE


def test_an_unknown_trigger_is_refused() -> None:
    with pytest.raises(ValueError, match="'schedule' or 'plateau'"):
        HeuristicPolicy(trigger="whim")
