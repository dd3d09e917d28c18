"""A run that is interrupted anywhere goes on to the last bit as if it had not been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
import esper.kasmina.growth as kasmina
from esper.errors import CheckpointError
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.checkpoint import checkpoints_in
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.session import Session
from esper.urza.library import LocalLibrary
from tests.support import ReadyLoader, command, germinate, mlp, stir, to_full
from tests.tolaria.runs import EPOCHS, Run, ready_kernels
from tests.tolaria.test_session import batches, loss_fn

ROOT = Path(esper.__file__).parents[1]


@pytest.fixture(scope="module")
def whole(
    _one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[Path]]:
    """A run that nothing interrupts, and a checkpoint after each of its steps and epochs."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder / "library", folder / "kept").go()
    assert run.session.checkpoints is not None and not run.session.checkpoints.left_out
    return run, checkpoints_in(folder / "kept")


def test_from_every_checkpoint_the_run_goes_on_bit_for_bit(
    whole: tuple[Run, list[Path]], tmp_path: Path
) -> None:
    run, kept = whole
    assert {s for states in run.states for s in states} >= {
        "GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING"}
    assert run.session.growth.fossils()
    end = run.end()
    for path in kept[::3]:
        again = Run(tmp_path, None, path)
        done = again.session.growth.step
        again.go()
        assert again.losses == run.losses[done:], path
        assert again.end().keys() == end.keys()
        assert all(torch.equal(v, end[k]) for k, v in again.end().items()), path
        assert again.session._holdout_losses == run.session._holdout_losses


def test_a_rollback_after_a_resume_goes_back_to_where_it_would_have(
    whole: tuple[Run, list[Path]], tmp_path: Path
) -> None:
    """In mid-epoch, with a seed being blended in: the state to go back to is another one."""
    run, kept = whole
    bad = next(i for i, s in enumerate(run.states) if "GRAFTING" in s) + 4
    path = next(p for p in kept if p.name.endswith(f"-step-{bad - 2}"))
    plain = Run(tmp_path, None)
    plain.nan_at = bad
    plain.go()
    assert plain.losses[: bad + 1] == run.losses[: bad + 1] and plain.losses != run.losses
    assert plain.session.growth.step < run.session.growth.step, "a batch was spent"
    again = Run(tmp_path, None, path)
    again.nan_at = bad
    again.go()
    assert again.losses == plain.losses[bad - 2 :]
    assert all(torch.equal(v, plain.end()[k]) for k, v in again.end().items())


@pytest.mark.slow
def test_killed_again_and_again_it_ends_where_the_uninterrupted_run_does(tmp_path: Path) -> None:
    def child(folder: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.tolaria.runs", str(tmp_path / folder),
             str(tmp_path / "library"), str(kill_at)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            timeout=300)

    plain = child("plain", -1)
    assert plain.returncode == 0, plain.stderr
    said: list[str] = []
    for kill_at in (9, 15, 22, 40):  # TRAINING, GRAFTING, STABILIZATION, a fossil in place
        killed = child("killed", kill_at)
        assert killed.returncode == -9, killed.stderr
        said += killed.stdout.splitlines()
    last = child("killed", -1)
    assert last.returncode == 0, last.stderr
    said += last.stdout.splitlines()
    assert said == plain.stdout.splitlines() and len(said) == EPOCHS * 6


def test_a_bare_loop_resumes_with_what_it_registered(tmp_path: Path) -> None:
    class Loader:
        """A loader that knows its place."""

        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Any:
            while self.at < len(data):
                self.at += 1
                yield data[self.at - 1]
            self.at = 0

        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["at"]

    data = batches("mlp", 8)

    def train(resume: Path | None, stop: int | None) -> tuple[list[float], Session]:
        torch.manual_seed(0)
        model = mlp()
        kasmina.wrap(model, sites=["1"], example=data[0][0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options: dict[str, Any] = {
            "loss_fn": loss_fn, "holdout": data[:1],
            "checkpoints": Checkpoints(tmp_path / "kept", every_steps=1, keep=2)}
        session = (Session(model, optimizer, **options) if resume is None
                   else Session.resume(resume, model, optimizer, **options))
        loader = Loader()
        session.register("data", loader)
        losses = []
        for _ in range(session.growth.epoch, 3):
            for batch in loader:
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                session.step(loss)
                assert session.checkpoints is not None
                session.checkpoints.wait()
                if session.growth.step == stop:
                    return losses, session
            session.epoch()
        return losses, session

    plain, session = train(None, None)
    session.close()
    first, session = train(None, 13)
    session.close()
    assert (session.growth.epoch, session.batch) == (1, 5)
    assert len(checkpoints_in(tmp_path / "kept")) == 2, "the last two stay"
    rest, session = train(tmp_path / "kept", None)
    session.close()
    assert first + rest == plain


def test_without_its_kernel_a_seed_goes_on_in_plain_torch(tmp_path: Path) -> None:
    data = batches("mlp", 4)

    def model_of(library: Any, resume: Path | None = None) -> Session:
        torch.manual_seed(0)
        model = mlp()
        kasmina.wrap(model, sites=["1", "3"], example=data[0][0])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        options = {"loss_fn": loss_fn, "holdout": data[:1], "library": library}
        if resume is None:
            return Session(model, optimizer, **options)
        return Session.resume(resume, model, optimizer, **options)

    with ready_kernels():
        session = model_of(LocalLibrary(tmp_path / "a"))
    germinate(session.growth, "1")
    germinate(session.growth, "3")
    to_full(session.growth, "1")
    stir(session.growth)
    session.growth.obey(command(Action.ADVANCE, "3"))
    for _ in range(session.growth.graft_steps // 2):
        session.growth.tick()
    session.save(tmp_path / "kept").result()
    for library in (LocalLibrary(tmp_path / "empty"), None):
        with pytest.warns(RuntimeWarning, match="k-test.*goes on as plain torch"):
            again = model_of(library, tmp_path / "kept")
        assert [s.state for s in again.growth.active()] == ["STABILIZATION", "GRAFTING"]
        assert 0 < again.growth.sites["3"].seed.alpha < 1  # type: ignore[union-attr]
        for run in (session, again):
            run.optimizer.zero_grad()
            loss_fn(run.model, data[1]).backward()
        for (name, a), b in zip(session.model.named_parameters(), again.model.parameters(),
                                strict=True):
            assert a.grad is not None and b.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad)
        again.close()
    session.close()


def test_a_command_in_flight_is_given_again(tmp_path: Path) -> None:
    class Never(ReadyLoader):
        def prefetch(self, *args: Any) -> Any:
            from concurrent.futures import Future

            return Future()

    data = batches("mlp", 2)
    model = mlp()
    kasmina.wrap(model, sites=["1"], example=data[0][0])
    session = Session(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn,
                      holdout=data[:1])
    session.growth.obey(command(Action.GERMINATE, "1"), Never())  # type: ignore[arg-type]
    session.save(tmp_path / "kept").result()
    session.close()
    fresh = mlp()
    kasmina.wrap(fresh, sites=["1"], example=data[0][0])
    with ready_kernels():
        again = Session.resume(
            tmp_path / "kept", fresh, torch.optim.SGD(fresh.parameters(), lr=0.1),
            loss_fn=loss_fn, holdout=data[:1], library=LocalLibrary(tmp_path / "library"))
    assert again.growth.sites["1"].state is SeedState.GERMINATED
    again.growth.tick()
    assert again.growth.sites["1"].state is SeedState.TRAINING
    again.close()


@pytest.mark.parametrize("how", ["sites", "size", "optimizer", "grown"])
def test_what_does_not_fit_is_refused(tmp_path: Path, how: str) -> None:
    data = batches("mlp", 2)
    model = mlp()
    kasmina.wrap(model, sites=["1"], example=data[0][0])
    session = Session(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                      loss_fn=loss_fn, holdout=data[:1])
    loss_fn(model, data[0]).backward()
    session.optimizer.step()
    session.save(tmp_path / "kept").result()
    session.close()
    fresh = mlp()
    if how == "size":
        fresh[4] = nn.Linear(12, 11)
    kasmina.wrap(fresh, sites=["3" if how == "sites" else "1"], example=data[0][0])
    if how == "grown":
        germinate(kasmina.growth_of(fresh), "1")
    groups: Any = fresh.parameters()
    if how == "optimizer":
        groups = [{"params": fresh[0].parameters()},
                  {"params": [*fresh[2].parameters(), *fresh[4].parameters()]}]
    message = {"sites": "made at the sites 1 ", "size": r"model.4.weight is .*\[11, 12\]",
               "optimizer": "the parameters that it had", "grown": "trained or grown already"}
    with pytest.raises(CheckpointError, match=message[how]):
        Session.resume(tmp_path / "kept", fresh, torch.optim.SGD(groups, lr=0.1, momentum=0.9),
                       loss_fn=loss_fn, holdout=data[:1])


def test_random_states_come_back_from_the_disk(tmp_path: Path) -> None:
    data = batches("mlp", 2)

    def session_of() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        kasmina.wrap(model, sites=["1"], example=data[0][0])
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    session = Session(*session_of(), loss_fn=loss_fn, holdout=data[:1])
    session.save(tmp_path / "kept").result()
    drawn = draw()
    session.close()
    fresh = session_of()
    Session.resume(tmp_path / "kept", *fresh, loss_fn=loss_fn, holdout=data[:1]).close()
    assert draw() == drawn
