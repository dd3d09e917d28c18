"""The session: steps, epochs, optimizer surgery, rollback, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

import esper.kasmina.growth as kasmina
from esper.errors import ContractError, EsperError
from esper.leyline.command import Action, FieldReport, Transition
from esper.leyline.events import Event, Topic
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind
from esper.leyline.verdict import ValidationReport
from esper.tamiyo.state import Catalog, Considered, Decision, SystemState
from esper.tolaria.session import Session
from esper.tolaria.trainer import Trainer
from esper.urza.library import LocalLibrary
from tests.artifacts import members, pack
from tests.support import HOSTS, ReadyLoader, bottleneck, command, germinate, mlp, to_full


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def batches(host: str, count: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    made = []
    for _ in range(count):
        x = HOSTS[host][1](8)
        shape = x.shape if host == "transformer" else (8,)
        made.append((x, torch.randint(0, 10, tuple(shape), generator=generator)))
    return made


class Scripted:
    """Commands by epoch; a policy like any other."""

    def __init__(self, script: dict[int, list[tuple[Action, str]]]) -> None:
        self.script, self.seen = script, []

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        self.seen.append(state)
        return Decision(tuple(command(a, s) for a, s in self.script.get(state.epoch, [])))


def make_session(host: str = "mlp", policy: Any = None, **options: Any) -> tuple[Session, Any]:
    torch.manual_seed(0)
    make, example, sites, causal = HOSTS[host]
    model = make()
    kasmina.wrap(model, sites=sites, example=example(), causal=causal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batches(host)
    session = Session(model, optimizer, loss_fn=loss_fn, holdout=data[:2],
                      policy=policy or Scripted({}), **options)
    session._loader = ReadyLoader()  # type: ignore[assignment]
    return session, data[2:]


@pytest.mark.parametrize("host", HOSTS)
def test_with_all_seeds_dormant_the_losses_equal_the_plain_models_bit_for_bit(host: str) -> None:
    def losses(wrapped: bool) -> list[float]:
        torch.manual_seed(0)
        make, example, sites, causal = HOSTS[host]
        model, x, data = make(), example(), batches(host)
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        session = None
        if wrapped:
            kasmina.wrap(model, sites=sites, example=x, causal=causal)
            session = Session(model, optimizer, loss_fn=loss_fn, holdout=data[:2])
        seen: list[float] = []

        def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, y = batch
            if inputs.is_floating_point():  # random state of the training loop counts too
                inputs = inputs + 0.01 * torch.randn_like(inputs)
            loss = loss_fn(model, (inputs, y))
            seen.append(float(loss.detach()))
            return loss

        Trainer(model, optimizer, noisy, data[2:], session).fit(3)
        if session is not None:
            session.close()
        return seen

    assert losses(wrapped=False) == losses(wrapped=True)


def test_new_parameters_join_the_optimizer_and_the_others_keep_their_state() -> None:
    session, data = make_session(policy=Scripted({1: [(Action.GERMINATE, "1")],
                                                  3: [(Action.CULL, "1")]}))
    model, optimizer = session.model, session.optimizer
    host = list(model.parameters())
    trainer = Trainer(model, optimizer, loss_fn, data, session)
    trainer.fit(2)
    seed = session.growth.active()[0]
    assert seed.state is SeedState.TRAINING
    in_groups = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(in_groups) == len({id(p) for p in in_groups}) == len(list(model.parameters()))
    steps = {int(optimizer.state[p]["step"]) for p in host}
    assert steps == {20}, "Adam's step count of the host went on through the growth"
    assert {int(optimizer.state[p]["step"]) for p in seed.params} == {9}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in host]
    gone = list(seed.params)
    session.growth.obey(command(Action.CULL, "1"))
    assert all(torch.equal(a, optimizer.state[p]["exp_avg"]) for a, p in zip(moments, host,
                                                                             strict=True))
    assert len(optimizer.param_groups) == 1 and not any(p in optimizer.state for p in gone)
    session.close()


def test_a_nan_rolls_model_optimizer_random_state_and_seeds_back() -> None:
    records: list[Any] = []
    session, data = make_session(observers=[records.append])
    model, optimizer = session.model, session.optimizer
    trainer = Trainer(model, optimizer, loss_fn, data, session)
    trainer.fit(1)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    torch_state = torch.get_rng_state()
    germinate(session.growth, "1")
    to_full(session.growth, "1")
    x, y = data[0]
    bad = (torch.full_like(x, float("nan")), y)
    loss = loss_fn(model, bad)
    loss.backward()
    optimizer.step()
    torch.rand(3)
    assert not session.step(loss)
    assert list(model.state_dict()) == list(saved)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(m, optimizer.state[p]["exp_avg"])
               for m, p in zip(moments, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert session.growth.sites["1"].state is SeedState.ROLLED_BACK
    assert any(isinstance(r, Event) and r.topic is Topic.ROLLBACK for r in records)
    assert any(isinstance(r, FieldReport) and r.outcome is SeedState.ROLLED_BACK for r in records)
    trainer.fit(1)
    session.close()


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def test_weights_that_went_bad_in_the_last_step_of_an_epoch_are_no_snapshot() -> None:
    session, data = make_session()
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(1)
    with torch.no_grad():
        next(session.model.parameters()).fill_(float("nan"))
    summary = session.epoch()
    assert summary.rolled_back and finite(session.model)
    assert session.rollbacks == 1 and torch.tensor(summary.holdout_loss).isfinite()
    session.close()


def test_losses_not_yet_looked_at_are_looked_at_before_the_snapshot() -> None:
    session, data = make_session()
    session._losses.check_every = 20  # as on a GPU
    assert session.step(loss_fn(session.model, data[0]))
    with torch.no_grad():
        next(session.model.parameters()).mul_(1e3)
    assert session.step(torch.tensor(float("inf")))
    assert session.epoch().rolled_back
    assert loss_fn(session.model, data[0]) < 10
    session.close()


def test_a_fossil_outlives_a_rollback_while_another_seed_is_blended_in() -> None:
    script = {1: [(Action.GERMINATE, "1")], 2: [(Action.ADVANCE, "1"), (Action.GERMINATE, "3")],
              3: [(Action.ADVANCE, "1"), (Action.ADVANCE, "3")], 4: [(Action.FOSSILIZE, "1")]}
    session, data = make_session(policy=Scripted(script))
    growth = session.growth
    growth.graft_steps = 8
    trainer = Trainer(session.model, session.optimizer, loss_fn, data, session)
    trainer.fit(4)
    (fossil,) = growth.fossils()
    assert growth.sites["3"].state is SeedState.STABILIZATION
    kept = [p.detach().clone() for p in fossil.params]
    with torch.no_grad():
        for p in session.model.parameters():
            p.fill_(float("nan"))
    assert not session.step(torch.tensor(float("nan")))
    assert growth.sites["3"].state is SeedState.ROLLED_BACK
    assert all(torch.equal(a, b) for a, b in zip(kept, fossil.params, strict=True))
    assert finite(session.model)
    trainer.fit(1)
    assert finite(session.model)
    session.close()


def test_a_run_that_keeps_failing_ends_with_an_error_that_says_so() -> None:
    session, _data = make_session(max_rollbacks=2)
    nan = torch.tensor(float("nan"))
    assert not session.step(nan) and not session.step(nan)
    with pytest.raises(EsperError, match="rolled back 2 times"):
        session.step(nan)
    session.close()


def test_an_exploding_loss_is_rolled_back_but_a_noisy_one_is_not() -> None:
    session, _ = make_session()
    for i in range(30):
        assert session.step(torch.tensor(1.0 + i % 3))
    assert session.step(torch.tensor(25.0))
    assert not session.step(torch.tensor(260.0))
    session.close()


def test_counterfactual_gains_reach_the_policy_and_the_field_report() -> None:
    records: list[Any] = []
    policy = Scripted({1: [(Action.GERMINATE, "3")], 3: [(Action.CULL, "3")]})
    session, data = make_session(policy=policy, observers=[records.append])
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(3)
    last = {s.name: s for s in policy.seen[-1].sites}["3"]
    assert last.state is SeedState.TRAINING and last.gain is not None
    (report,) = [r for r in records if isinstance(r, FieldReport)]
    assert report.gain == pytest.approx(last.gain) and report.outcome is SeedState.CULLED
    assert report.epochs == 2
    trail = {r.trace_id for r in records if isinstance(r, Transition)}
    assert report.trace_id in trail
    session.close()


def test_no_holdout_is_an_error() -> None:
    model = mlp()
    kasmina.wrap(model, sites=["1"], example=torch.randn(2, 16))
    with pytest.raises(ContractError, match="holdout is empty"):
        Session(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, holdout=[])


SCHEDULERS = {
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=10),
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.9),
    "cyclic": lambda o: lrs.CyclicLR(o, 1e-3, 9e-3, step_size_up=50),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=9e-3, total_steps=20),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.ExponentialLR(o, 0.9)], [2]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o), lrs.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_over_growth_rollback_and_culling(name: str) -> None:
    session, data = make_session()
    optimizer = session.optimizer
    scheduler = SCHEDULERS[name](optimizer)
    session.close()
    kasmina.unwrap(session.model)
    kasmina.wrap(session.model, sites=["1"], example=data[0][0])
    again = Session(session.model, optimizer, loss_fn=loss_fn, holdout=data[:1],
                    policy=Scripted({}), scheduler=scheduler, lr_scale=0.5)
    again.growth.embargo_epochs = 1
    again._loader = ReadyLoader()  # type: ignore[assignment]
    trainer = Trainer(session.model, optimizer, loss_fn, data, again, scheduler)
    trainer.fit(1)

    def grow_and_compare() -> None:
        germinate(again.growth, "1")
        trainer.fit(2)
        first, second = (g["lr"] for g in optimizer.param_groups)
        assert first < 1e-2 and second == pytest.approx(first / 2)

    grow_and_compare()
    # The snapshot of this epoch has the scheduler with a group that the rollback takes away.
    assert not again.step(torch.tensor(float("nan")))
    trainer.fit(1)
    assert len(optimizer.param_groups) == 1
    grow_and_compare()
    again.growth.obey(command(Action.CULL, "1"))
    trainer.fit(1)
    assert len(optimizer.param_groups) == 1
    again.close()


def test_kernels_for_another_torch_are_not_offered_and_stay_sound(tmp_path: Path) -> None:
    """A library outlives torch builds; what is refused here is no failure in the field."""
    library = LocalLibrary(tmp_path)
    model = mlp()
    kasmina.wrap(model, sites=["1"], example=torch.randn(2, 16))
    signature = kasmina.growth_of(model).sites["1"].found.signature
    code = {"forward.so": b"\x7fELF", "backward.so": b"\x7fELF"}
    ir = bottleneck(SiteKind.FEATURES)
    library.submit(ir, signature, author="test")
    for torch_build in (None, "1.0.0"):
        claim = library.claim_blueprint("test", 60) or library.claim_recompilation(
            ir.id, signature, "test", 60)
        assert claim is not None
        made = library.complete_blueprint(
            claim, pack(members(ir, signature, code, torch_build=torch_build).items()))
        work = library.claim_kernel("test", 60)
        assert work is not None
        library.complete_kernel(work, ValidationReport(
            kernel_id=made.kernel_id, accepted=True, seconds=0.0))
    assert len(library.kernels()) == 2
    session = Session(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn,
                      holdout=batches("mlp", 1), library=library)
    assert session._watch is not None
    (offered,) = session._watch.refresh().kernels
    assert offered.manifest.toolchain.torch == torch.__version__
    session.close()


def test_the_mean_loss_of_an_epoch_leaves_spent_batches_out() -> None:
    session, data = make_session()
    losses = iter([1.0, float("nan"), 2.0, 6.0])

    def told(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_fn(model, batch) * 0 + next(losses)

    means: list[float] = []
    trainer = Trainer(session.model, session.optimizer, told, data[:4], session)
    trainer.fit(1, lambda epoch, summary, mean: means.append(mean))
    assert means == [3.0]
    session.close()


def test_one_trace_leads_from_the_choice_to_the_outcome() -> None:
    class Choosy(Scripted):
        def decide(self, state: SystemState, catalog: Catalog) -> Decision:
            commands = super().decide(state, catalog).commands
            seen = tuple(Considered(c.kernel_id or "", c.site, True, "why") for c in commands)
            # What concerns the seed carries its trace, as the heuristic's commands do.
            trace = next((s.trace_id for s in state.sites if s.trace_id), None)
            return Decision(tuple(
                c if trace is None else c.model_copy(update={"trace_id": trace})
                for c in commands), seen if state.epoch == 1 else ())

    records: list[Any] = []
    session, data = make_session(observers=[records.append], policy=Choosy(
        {1: [(Action.GERMINATE, "3")], 2: [(Action.CULL, "3")]}))
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(2)
    session.close()
    trace = next(r.trace_id for r in records if isinstance(r, Event) and r.topic is Topic.COMMANDS)
    kinds = [type(r).__name__ for r in records if getattr(r, "trace_id", None) == trace]
    # The second Event is the seed's health at the end of its first epoch.
    assert kinds == ["Event", "Command", "Transition", "Transition", "Event", "Command",
                     "Transition", "FieldReport"]
