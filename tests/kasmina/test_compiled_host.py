"""A host that torch.compile made one graph of grows behind that graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import esper
from esper.errors import SiteError
from esper.kasmina import slot
from esper.kasmina.growth import Growth
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.measure import counterfactual_gain, mean_loss
from esper.tolaria.optimizer import OptimizerSurgeon
from esper.tolaria.scores import site_scores
from esper.urza.library import LocalLibrary
from tests.csrc.pair import CHANNELS, PairLoader
from tests.support import ReadyLoader, command, germinate, to_full

pytestmark = pytest.mark.slow
SITES = ["1", "2", "3", "4"]


class Block(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.again = again

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


def host(again: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(again) for _ in SITES]
    return nn.Sequential(nn.Linear(16, CHANNELS), *blocks, nn.Linear(CHANNELS, 4))


def batch() -> tuple[Tensor, Tensor]:
    """Something that can be learnt: which quarter of the circle two features are in."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 16, generator=generator)
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def loss_fn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


class Run:
    """A host in training, compiled or not, with what counts its compilations."""

    def __init__(
        self, backend: str | None, plain: nn.Module | None = None, lr: float = 3e-3
    ) -> None:
        torch.compiler.reset()
        counters.clear()
        plain = host() if plain is None else plain
        self.count = CompileCounterWithBackend(backend or "eager")
        self.model: Any = torch.compile(plain, backend=self.count) if backend else plain
        esper.wrap(self.model, sites=SITES, example=batch()[0][:2])
        self.growth: Growth = esper.growth_of(self.model)
        self.growth.embargo_epochs, self.growth.graft_steps = 0, 4
        learning = [p for p in plain.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr)
        surgeon = OptimizerSurgeon(self.optimizer)
        self.growth.on_join, self.growth.on_leave = surgeon.join, surgeon.leave
        self.losses: list[float] = []
        self.context: Callable[[], Any] = torch.enable_grad

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            with self.context():
                loss = loss_fn(self.model, batch())
            loss.backward()
            self.optimizer.step()
            self.growth.tick()
            self.losses.append(float(loss.detach()))

    def grow(self, site: str, *, cull: bool = False) -> None:
        self.growth.obey(command(Action.GERMINATE, site), PairLoader())  # type: ignore[arg-type]
        self.step(3)
        assert self.growth.sites[site].state is SeedState.TRAINING
        if cull:
            self.growth.obey(command(Action.CULL, site))
            return
        self.growth.obey(command(Action.ADVANCE, site))
        self.step(4)
        assert self.growth.sites[site].state is SeedState.STABILIZATION
        self.growth.obey(command(Action.ADVANCE, site))
        self.growth.obey(command(Action.FOSSILIZE, site))
        self.step()

    def assert_one_graph(self) -> None:
        assert self.count.frame_count == 1
        assert not counters["graph_break"]


def both(
    backend: str, work: Callable[[Run], None], *, tolerance: float = 2e-4, **given: Any
) -> Run:
    """The same work on an eager host and on a compiled one; losses must agree step by step."""
    compiled, eager = Run(backend, **copy.deepcopy(given)), Run(None, **given)
    work(compiled)
    compiled.assert_one_graph()
    work(eager)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=tolerance, atol=tolerance)
    return compiled


def test_twelve_growths_one_compilation() -> None:
    def work(run: Run) -> None:
        run.step()
        for growth in range(12):
            run.grow(SITES[growth % 4], cull=growth % 4 == 3)

    run = both("inductor", work)
    assert len(run.growth.fossils()) == 9
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert all(f.failure is None and f.params[0].grad.abs().sum() > 0 for f in run.growth.fossils())


class Wordy(Block):
    """Says more than its tensor, and takes what another one says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Any) -> Any:
        if self.kind == "tuple":
            return (super().forward(x[0] if isinstance(x, tuple) else x), None)
        return {"said": None, "h": super().forward(x["h"] if isinstance(x, dict) else x)}


@pytest.mark.parametrize("kind", ["plain", "tuple", "dict"])
def test_a_block_called_twice_is_one_slot_in_one_graph(kind: str) -> None:
    plain = host()
    if kind != "plain":
        plain[1] = Wordy(kind)

        class Plain(nn.Module):
            def forward(self, x: Any) -> Tensor:
                return x[0] if isinstance(x, tuple) else x["h"]

        plain[3] = Plain()
    plain[2] = plain[1]

    def work(run: Run) -> None:
        assert "2" not in run.growth.sites
        run.step()
        run.grow("1")
        run.step(3)

    run = both("aot_eager", work, plain=plain)
    assert all(f.failure is None for f in run.growth.fossils())


def test_seeds_learn_in_a_frozen_host() -> None:
    plain = host()
    plain[:-1].requires_grad_(False)

    def work(run: Run) -> None:
        run.step()
        run.grow("1")
        run.growth.obey(command(Action.GERMINATE, "3"), PairLoader())  # type: ignore[arg-type]
        run.step(20)

    run = both("inductor", work, plain=plain, lr=1e-2)
    assert run.losses[-1] < 0.9 * run.losses[0]


def test_autocast() -> None:
    def work(run: Run) -> None:
        run.context = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        run.step()
        run.grow("2")
        run.step(5)

    run = both("inductor", work, tolerance=0.05)
    assert run.growth.fossils()[0].failure is None


def test_activation_checkpointing() -> None:
    """Each block is recomputed in the backward, the seeds at its inner layer with it."""
    def work(run: Run) -> None:
        run.step()
        run.grow("2")
        run.grow("3", cull=True)
        run.step(3)

    both("inductor", work, plain=host(again=True))


def test_measurements_guards_and_rollback() -> None:
    run = Run("aot_eager")
    model, growth, data = run.model, run.growth, batch()
    run.step()
    growth.obey(command(Action.GERMINATE, "2"), PairLoader())  # type: ignore[arg-type]
    run.step(2)
    (seed,) = growth.active()
    assert set(site_scores(model, growth, loss_fn, [data])) == set(SITES)
    grads = [p.grad.clone() for p in seed.params]
    gain, without, with_it = counterfactual_gain(model, loss_fn, [data], seed)
    assert gain == without - with_it != 0
    assert without == pytest.approx(mean_loss(model, loss_fn, [data]))
    for p, g in zip(seed.params, grads, strict=True):
        assert torch.equal(p.grad, g), "measuring is nothing to learn from"

    session = esper.Session(model, run.optimizer, loss_fn=loss_fn, holdout=[data])
    before = mean_loss(model, loss_fn, [data])
    growth.obey(command(Action.ADVANCE, "2"))
    run.step(4)
    assert mean_loss(model, loss_fn, [data]) != before
    grads = [p.grad.clone() for p in seed.params]
    site_scores(model, growth, loss_fn, [data])
    for p, g in zip(seed.params, grads, strict=True):
        assert torch.equal(p.grad, g), "autograd.grad asks, and leaves nothing behind"
    loss_fn(model, data).backward()
    assert session.step(torch.tensor(float("nan"))) is False
    assert growth.sites["2"].state is SeedState.DORMANT  # no embargo here
    assert mean_loss(model, loss_fn, [data]) == pytest.approx(before)
    session.close()

    growth.guards = (lambda health: "too far" if health.drift else None,)
    growth.graft_steps = 100
    growth.obey(command(Action.GERMINATE, "2"), PairLoader())  # type: ignore[arg-type]
    run.step(1)
    growth.obey(command(Action.ADVANCE, "2"))
    told: list[str] = []
    growth.observers.append(lambda transition: told.append(transition.trigger))
    run.step(12)
    assert told[0] == "too far"
    # One graph for training, one for evaluation under no_grad: no growth made another.
    assert run.count.frame_count == 2 and not counters["graph_break"]


def test_a_failing_kernel_is_culled_and_the_host_trains_on() -> None:
    run = Run("aot_eager")
    run.step()
    growth = run.growth
    growth.obey(command(Action.GERMINATE, "2"), PairLoader())  # type: ignore[arg-type]
    run.step()
    (seed,) = growth.active()
    seed.params[1].data = torch.zeros(10, dtype=torch.float64)  # what the kernel cannot take
    failures: list[str] = []
    growth.on_failure = lambda seed, reason: failures.append(reason)
    triggers: list[str] = []
    growth.observers.append(lambda t: triggers.append(t.trigger))
    run.step(2)
    assert "a parameter is" in failures[0] and growth.sites["2"].seed is None
    run.step(2)
    growth.obey(command(Action.GERMINATE, "3"), ReadyLoader())  # type: ignore[arg-type]
    run.step()
    assert any("native kernels only" in t for t in triggers), "why, and not the kernel's fault"
    assert len(failures) == 1
    run.assert_one_graph()


def test_export_copy_and_unwrap() -> None:
    run = Run("aot_eager")
    run.step()
    names = list(host().state_dict())
    x = batch()[0]
    run.grow("2")
    run.growth.obey(command(Action.GERMINATE, "3"), PairLoader())  # type: ignore[arg-type]
    run.step(2)
    grown = run.model(x)
    plain = esper.export(run.model)
    torch.testing.assert_close(plain(x), grown)
    assert not any(isinstance(h, slot.Slot)
                   for m in plain.modules() for h in m._forward_hooks.values())

    average = copy.deepcopy(run.growth.model)
    assert torch.equal(average(x), run.growth.model(x))
    with torch.no_grad():
        for p in run.growth.fossils()[0].params:
            p.zero_()
    torch.testing.assert_close(average(x), grown)
    assert not torch.allclose(run.model(x), grown)
    run.assert_one_graph()

    esper.unwrap(run.model)
    assert list(run.growth.model.state_dict()) == names
    assert not any(m._forward_hooks for m in run.growth.model.modules())
    torch.testing.assert_close(run.model(x), run.growth.model(x))


def test_a_model_that_ran_compiled_before_it_was_wrapped() -> None:
    for compile_it in (lambda m: torch.compile(m, backend="aot_eager"), None):
        plain: Any = host()
        model = plain if compile_it is None else compile_it(plain)
        if compile_it is None:
            model.compile(backend="aot_eager")
        x = batch()[0]
        before = model(x).detach()
        esper.wrap(model, sites=SITES, example=x[:2])
        growth = esper.growth_of(model)
        growth.graft_steps = 1
        germinate(growth, "2", PairLoader())
        to_full(growth, "2")
        assert not torch.allclose(model(x), before)
        esper.unwrap(model)


def test_what_cannot_grow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = host()
    esper.wrap(model, sites=SITES, example=batch()[0][:2])
    with pytest.raises(SiteError, match="wrapped first and compiled later"):
        esper.growth_of(torch.compile(model, backend="aot_eager"))
    monkeypatch.setattr(slot, "extension", lambda: None)
    with pytest.raises(SiteError, match="grows through esper's extension"):
        esper.wrap(torch.compile(host(), backend="aot_eager"), sites=SITES,
                   example=batch()[0][:2])


def test_hooks_on_saved_tensors() -> None:
    run = Run("aot_eager")
    germinate(run.growth, "2", PairLoader())
    to_full(run.growth, "2")
    params = [*run.growth.model.parameters()]
    grads = []
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        run.optimizer.zero_grad()
        with hooks:
            loss = loss_fn(run.model, batch())
        loss.backward()
        grads.append([p.grad.clone() for p in params])
    for plain, moved in zip(*grads, strict=True):
        assert torch.equal(plain, moved)


def test_a_checkpoint_of_a_compiled_host_resumes_in_a_compiled_and_in_an_eager_one(
    tmp_path: Path
) -> None:
    def session_of(backend: str | None, resume: bool) -> tuple[Run, esper.Session]:
        run = Run(backend)
        average = AveragedModel(run.model)
        make = esper.Session if not resume else partial(esper.Session.resume, tmp_path / "kept")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("esper.tolaria.library.Loader", lambda library: PairLoader())
            session = make(run.model, run.optimizer, loss_fn=loss_fn, holdout=[batch()],
                           library=LocalLibrary(tmp_path / "library"), ema=average)
        return run, session

    def train(run: Run, session: esper.Session, steps: int) -> None:
        for _ in range(steps):
            run.optimizer.zero_grad()
            loss = loss_fn(run.model, batch())
            loss.backward()
            run.optimizer.step()
            session.parts.ema.update_parameters(run.growth.model)  # type: ignore[union-attr, operator]
            session.step(loss)
            run.losses.append(float(loss.detach()))

    run, session = session_of("aot_eager", resume=False)
    for site, ahead in (("2", True), ("3", False)):
        run.growth.obey(command(Action.GERMINATE, site), PairLoader())  # type: ignore[arg-type]
        train(run, session, 3)
        if ahead:
            run.growth.obey(command(Action.ADVANCE, site))
            train(run, session, 2)
    session.save(tmp_path / "kept").result()
    train(run, session, 6)
    ema = {n.replace("_orig_mod.", ""): p for n, p in
           session.parts.ema.named_parameters()}  # type: ignore[union-attr]
    session.close()
    for backend in ("aot_eager", None):
        again, resumed = session_of(backend, resume=True)
        assert [s.state for s in again.growth.active()] == ["STABILIZATION", "TRAINING"]
        train(again, resumed, 6)
        torch.testing.assert_close(again.losses, run.losses[-6:], rtol=1e-4, atol=1e-4)
        assert resumed.parts.ema is not None
        for name, p in resumed.parts.ema.named_parameters():
            torch.testing.assert_close(p, ema[name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-4)
        resumed.close()
