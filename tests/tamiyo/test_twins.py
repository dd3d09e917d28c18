"""The twins: as often, as long and as dear as the policy they stand beside, and blind."""

from __future__ import annotations

from collections import Counter

import pytest

from esper.errors import ContractError
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.triggers import Schedule
from esper.tamiyo.twins import FixedSchedule, RandomTwin
from tests.tamiyo.states import World, catalog, kernel, site

SCHEDULE = Schedule(start=4, every=8, until=0.6)
KERNELS = catalog(*(kernel(f"k{i}", created=9 - i) for i in range(9)))
SITES = (site("a"), site("b"), site("c"))


def test_a_random_twin_grows_as_often_within_the_same_epochs_elsewhere_and_at_other_times() -> None:
    real = World(SITES, KERNELS).run(HeuristicPolicy(SCHEDULE, max_active=2), 60, planned=60)
    assert [e for e, _, _ in real.grown] == [4, 12, 20, 28, 36]
    runs = [World(SITES, KERNELS).run(
        RandomTwin(60, like=SCHEDULE, max_active=2, seed=seed), 60, planned=60)
        for seed in range(20)]
    for run in runs:
        assert len(run.grown) == 5 and all(4 <= e <= 36 + 6 for e, _, _ in run.grown)
        assert all(s.score is None for s in run.sites.values())
        assert not any(w & {n for e, n, _ in run.grown if e == epoch}
                       for epoch, w in enumerate(run.wanted, 1)), "no site was scored"
    assert len({tuple(e for e, _, _ in r.grown) for r in runs}) > 15
    for place in (1, 2):  # sites and kernels
        counts = Counter(g[place] for r in runs for g in r.grown)
        assert len(counts) == (3 if place == 1 else 9) and min(counts.values()) > 2
    same = World(SITES, KERNELS).run(RandomTwin(60, like=SCHEDULE, max_active=2, seed=3), 60)
    assert same.grown == runs[3].grown


def test_a_random_twin_cares_for_its_seeds_as_the_policy_does() -> None:
    run = World(SITES, KERNELS, gain=-0.1).run(RandomTwin(60, like=SCHEDULE, seed=1), 60)
    assert run.grown and not run.living, "what does not pay is culled"


def test_a_window_without_an_epoch_is_refused() -> None:
    with pytest.raises(ContractError, match="growth starts at 4 and ends at 3"):
        RandomTwin(5, like=SCHEDULE)


@pytest.mark.parametrize("gain", [0.1, -0.1, float("nan")])
def test_a_fixed_schedule_looks_at_nothing(gain: float) -> None:
    run = World(SITES, KERNELS, gain).run(FixedSchedule(trigger=SCHEDULE), 60, planned=60)
    assert run.grown == [(4, "a", "k8"), (12, "b", "k8"), (20, "c", "k8"), (28, "a", "k8"),
                         (36, "b", "k8")], "k8 is the oldest"
    assert not any(run.wanted) and len(run.living) == 5
    assert sum(s.fossils for s in run.sites.values()) == 5


def test_a_fixed_schedule_grows_the_blueprint_it_is_told_or_none() -> None:
    named = {b: ir.model_copy(update={"name": b}) for b, ir in KERNELS.blueprints.items()}
    known = catalog(*KERNELS.kernels, capacity=1.0)
    known = type(known)(known.kernels, blueprints=named)
    run = World(SITES, known).run(
        FixedSchedule(trigger=SCHEDULE, blueprint="bp-k3"), 60, planned=60)
    assert {k for _, _, k in run.grown} == {"k3"} and len(run.grown) == 5
    other = World(SITES, known).run(FixedSchedule(trigger=SCHEDULE, blueprint="none"), 9)
    assert not other.grown
    assert {c.reason for d in other.decisions for c in d.considered} == {
        "not the blueprint 'none'"}
