"""What is measured at an epoch boundary: what the policy wants, each thing once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import esper.kasmina.growth as kasmina
from esper.leyline.command import Action
from esper.leyline.events import Event, Topic
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import Catalog, Decision, Spent, SystemState
from esper.tolaria.measure import counterfactual_gain, mean_loss
from esper.tolaria.trainer import Trainer
from esper.urza.library import LocalLibrary
from tests.support import HOSTS, command, germinate, stir, to_full
from tests.tolaria.test_session import Scripted, batches, loss_fn, make_session


class Asking(Scripted):
    """A scripted policy that says which sites it will look at."""

    def __init__(self, script: Any, wanted: dict[int, set[str]]) -> None:
        super().__init__(script)
        self.wanted = wanted

    def wants(self, state: SystemState, catalog: Catalog) -> frozenset[str]:
        assert all(s.gain is None and s.score is None for s in state.sites)
        return frozenset(self.wanted.get(state.epoch, ()))


def test_only_what_the_policy_wants_is_measured(tmp_path: Path) -> None:
    policy = Asking({1: [(Action.GERMINATE, "3")]}, {1: {"1"}, 3: {"1", "3"}})
    session, data = make_session(policy=policy, library=LocalLibrary(tmp_path))
    taken = []
    trainer = Trainer(session.model, session.optimizer, loss_fn, data, session)
    trainer.fit(3, lambda epoch, summary, loss: taken.append(summary))
    session.close()
    seen = [{s.name: (s.score is not None, s.gain is not None) for s in state.sites}
            for state in policy.seen]
    nothing = (False, False)
    assert seen == [{"1": (True, False), "3": nothing}, {"1": nothing, "3": nothing},
                    {"1": (True, False), "3": (False, True)}]
    # Two held-out batches: their loss, the score of one site, the other loss of the seed.
    assert [(s.passes.forward, s.passes.backward) for s in taken if s is not None] == [
        (4, 2), (2, 0), (6, 2)]
    assert [s.planned_epochs for s in policy.seen] == [3, 3, 3]


def test_a_policy_that_says_nothing_is_shown_everything(tmp_path: Path) -> None:
    policy = Scripted({1: [(Action.GERMINATE, "3")]})
    session, data = make_session(policy=policy, library=LocalLibrary(tmp_path))
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(2)
    session.close()
    first, second = ({s.name: s for s in state.sites} for state in policy.seen)
    assert first["1"].score is not None and first["3"].score is not None
    assert second["1"].score is not None and second["3"].gain is not None
    now = policy.seen[-1]
    assert now.grown_flops and now.seeds == {second["3"].trace_id} and now.growths == 1


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("at", [SeedState.TRAINING, SeedState.EVALUATING])
def test_the_loss_that_is_known_already_is_not_measured_again(host: str, at: SeedState) -> None:
    """It is the loss without a seed in TRAINING and with any later one, to the last bit."""
    torch.manual_seed(0)
    make, example, sites, causal = HOSTS[host]
    model, held_out = make(), batches(host, 2)
    kasmina.wrap(model, sites=sites, example=example(), causal=causal)
    growth = kasmina.growth_of(model)
    name = list(growth.sites)[-1]
    germinate(growth, name)
    if at is SeedState.EVALUATING:
        to_full(growth, name)
        growth.obey(command(Action.ADVANCE, name))
    stir(growth)
    (seed,) = growth.active()
    assert seed.state is at
    known = mean_loss(model, loss_fn, held_out)

    def forced(alpha: float) -> float:
        seed.forced = alpha
        loss = mean_loss(model, loss_fn, held_out)
        seed.forced = None
        return loss

    without, with_it = forced(0.0), forced(0.1 if at is SeedState.TRAINING else 1.0)
    assert without != with_it
    measured = counterfactual_gain(model, loss_fn, held_out, seed, known)
    assert measured == (without - with_it, without, with_it)


def test_what_is_spent_of_the_budgets_is_told() -> None:
    class Thrifty(Scripted):
        def decide(self, state: SystemState, catalog: Catalog) -> Decision:
            return Decision(budgets=(Spent("latency", "ms", None, 3.0),))

    records: list[Any] = []
    session, data = make_session(policy=Thrifty({}), observers=[records.append])
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(1)
    session.close()
    (event,) = [r for r in records if isinstance(r, Event) and r.topic is Topic.EPOCH]
    assert event.body["budgets"] == [
        {"name": "latency", "unit": "ms", "spent": None, "limit": 3.0}]
