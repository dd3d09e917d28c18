"""What one rank does in the tests of data-parallel runs; started by `teamwork.launch`."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import esper.kasmina.growth as kasmina
from esper.errors import ArtifactCorrupt, EsperError
from esper.kasmina.guards import Health
from esper.kasmina.loader import Loader
from esper.leyline.command import Action, FieldReport, Transition
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.session import Session
from esper.tolaria.sharded import clip_grad_norm_, part, whole
from esper.tolaria.trainer import Trainer
from esper.urza.library import LocalLibrary
from tests.support import ReadyLoader, bottleneck, command, mlp, plain_kernel, stir
from tests.tolaria.runs import ready_kernels
from tests.tolaria.teamwork import BATCH, STEPS, Job, parallel


def life(rank: int, size: int, folder: Path, kind: str, epochs: int = 9) -> Any:
    """A whole script of growth; NaN on the last rank alone, in the last epoch but one."""
    job = Job(rank, size, folder, kind=kind)
    seen, gains = [], []
    for epoch in range(epochs):
        if epoch == epochs - 2:
            job.nan_at = job.session.growth.step + 2 if rank == size - 1 else -1
        for step in range(STEPS):
            job.step(job.rows(step))
        summary = job.session.epoch()
        gains.append([summary.holdout_loss, summary.train_loss,
                      [(s.name, s.gain, s.score) for s in summary.sites]])
        seen.append([job.sites(), job.state(), summary.rolled_back])
    session = job.session
    session.close()
    return {"seen": seen, "gains": gains, "growth_steps": session.growth_steps,
            "asked": job.policy.asked, "losses": job.losses, "run_id": session.run_id,
            "watches": session._watch is not None,
            "reports": sum(isinstance(r, FieldReport) for r in job.records),
            "moves": [(r.step, r.site, r.after, r.trigger) for r in job.records
                      if isinstance(r, Transition)],
            "parameters": {n: whole(p.detach()).flatten().tolist()[:4]
                           for n, p in session.growth.model.named_parameters()}}


# -- gradients ----------------------------------------------------------------------------


def _grown(model: nn.Module, loader: Any, kernel: Any, session: Session | None) -> kasmina.Growth:
    """Seeds at both sites, in TRAINING, moved away from their birth."""
    growth = kasmina.growth_of(model)
    growth.graft_steps, growth.reproducible = 4, True
    for site in ("1", "3"):
        asked = command(Action.GERMINATE, site)
        if kernel:
            asked = asked.model_copy(update={"kernel_id": kernel[0], "blueprint_id": kernel[1]})
        growth.obey(asked, loader)
    if session is not None:
        session._team.meet()
    growth.tick()
    assert all(s.state is SeedState.TRAINING for s in growth.active()), growth.sites
    stir(growth)
    return growth


def _onward(growth: kasmina.Growth, stage: str) -> None:
    match stage:
        case "GRAFTING":
            for site in ("1", "3"):
                growth.obey(command(Action.ADVANCE, site))
            growth.tick()
            growth.tick()  # alpha between 0 and 1
        case "STABILIZATION":
            growth.tick()
            growth.tick()
        case "FOSSILIZED":
            for action in (Action.ADVANCE, Action.FOSSILIZE):
                for site in ("1", "3"):
                    growth.obey(command(action, site))


def gradients(
    rank: int, size: int, folder: Path, kind: str, library: Path | None = None,
    kernel: Any = None, **options: Any
) -> Any:
    """Those of several ranks, each on its part of a batch, and of one process on the whole of it,
    with seeds in four states; then accumulated, and clipped. With a `library`, seeds run its
    `kernel`; one in plain torch else."""
    def host(compiled: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = mlp()
        if "find_unused_parameters" in options:
            model.register_module("unused", nn.Linear(2, 2))
            model.forward = lambda x: nn.Sequential.forward(  # type: ignore[method-assign]
                nn.Sequential(*list(model.children())[:5]), x)
        model[2].weight.requires_grad_(kind != "layers")  # frozen, in part
        if compiled:
            model = torch.compile(model, backend="aot_eager")
        return kasmina.wrap(model, sites=["1", "3"], example=torch.randn(2, 16))

    plain, wrapped = host(), host(compiled=kind == "compiled")
    inner: nn.Module = getattr(wrapped, "_orig_mod", wrapped)
    made = parallel(wrapped, kind, size, **options)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16 * size, 16, generator=generator)
    y = torch.randint(0, 10, (16 * size,), generator=generator)

    def loss_fn(model: nn.Module, rows: slice) -> Tensor:
        return F.cross_entropy(model(x[rows]), y[rows])

    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    opened = LocalLibrary(library or folder / "library")
    with ready_kernels() if library is None else nullcontext():
        session = Session(made, optimizer, loss_fn=loss_fn, holdout=[slice(0, 4)],
                          library=opened)
    own: Any = ReadyLoader() if library is None else Loader(opened)
    whole_growth = _grown(plain, own, kernel, None)
    growth = _grown(made, session._loader, kernel, session)
    own.close()
    mine, everything = slice(rank, None, size), slice(None)
    compared = 0

    def compare() -> None:
        nonlocal compared
        theirs = dict(plain.named_parameters())
        for name, p in inner.named_parameters():
            if theirs[name].grad is None:
                assert p.grad is None or not part(p.grad).any(), name
                continue
            assert p.grad is not None, name
            torch.testing.assert_close(whole(p.grad), theirs[name].grad)
            compared += 1

    for stage in ("TRAINING", "GRAFTING", "STABILIZATION", "FOSSILIZED"):
        _onward(whole_growth, stage)
        _onward(growth, stage)
        assert {str(s.state) for s in growth.active() + growth.fossils()} == {stage}
        made.zero_grad()
        plain.zero_grad()
        loss_fn(made, mine).backward()
        loss_fn(plain, everything).backward()
        compare()
    # Two micro-batches make a step.
    made.zero_grad()
    plain.zero_grad()
    half = 8 * size
    first, second = slice(rank, half, size), slice(half + rank, None, size)
    if kind in ("ddp", "compiled"):
        with made.no_sync():  # type: ignore[operator]
            loss_fn(made, first).backward()
    else:
        made.set_requires_gradient_sync(False)  # type: ignore[operator]
        loss_fn(made, first).backward()
        made.set_requires_gradient_sync(True)  # type: ignore[operator]
    loss_fn(made, second).backward()
    for rows in (slice(0, half), slice(half, None)):
        loss_fn(plain, rows).backward()
    compare()
    norm = clip_grad_norm_(made.parameters(), 0.01)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    torch.testing.assert_close(norm, expected)
    compare()
    optimizer.step()
    session.close()
    return compared


# -- what only one rank meets -------------------------------------------------------------


class Slow(ReadyLoader):
    """A kernel that is there once `let` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Future[Any], Any]] = []

    def prefetch(self, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._held.append((future, super().prefetch(*args).result()))
        return future

    def let(self) -> None:
        for future, ready in self._held:
            future.set_result(ready)
        self._held.clear()


class Breaks:
    """A kernel that computes for so many calls and then raises."""

    def __init__(self, calls: int) -> None:
        site = SiteSignature(kind=SiteKind.MAP, channels=8)
        self._kernel, self._left = plain_kernel(bottleneck(site.kind), site), calls

    def __call__(self, *args: Any) -> Tensor:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("it broke here")
        return self._kernel(*args)  # type: ignore[no-any-return]


GERMINATE = {1: [(Action.GERMINATE, "2")], 2: [(Action.ADVANCE, "2")]}


def trouble(rank: int, size: int, folder: Path, what: str) -> Any:
    """`what` happens on the last rank alone; what all of them make of it."""
    last = rank == size - 1
    loader: Any = None
    script: Any = GERMINATE
    if what == "late" and last:
        loader = Slow()
    if what == "load" and last:
        loader = ReadyLoader(error=ArtifactCorrupt("the digest does not match"))
    if what == "kernel" and last:
        loader = ReadyLoader(Breaks(16))
    job = Job(rank, size, folder, script=script, loader=loader, reproducible=what != "late")
    session = job.session
    quarantined: list[str] = []
    session.growth.on_failure = lambda seed, reason: quarantined.append(reason)
    if what == "guard" and last:
        real = session.growth.vitals.health

        def health(seed: Any) -> Health:
            seed.health = lambda: Health(drift=50.0, grad_norm=0.1)
            return real(seed)

        session.growth.vitals.health = health  # type: ignore[method-assign]
    states = []
    for _ in range(6):
        for step in range(STEPS):
            if what == "late" and last and session.growth.step == 10:
                loader.let()
            job.step(job.rows(step))
        if what == "holdout" and last and session.growth.epoch == 3:
            for p in session.growth.model.parameters():
                p.data.fill_(float("nan"))
        if session.epoch().rolled_back and what == "holdout":
            states.append(session.rollbacks)
        states.append(job.state())
    session.close()
    return {"states": states, "quarantined": quarantined, "sites": job.sites(),
            "moves": [(r.step, r.site, r.after, r.trigger) for r in job.records
                      if isinstance(r, Transition)]}


def in_flight(rank: int, size: int, folder: Path) -> Any:
    """A run that is saved while a kernel is on its way, and resumed."""
    loader = Slow()
    job = Job(rank, size, folder, script=GERMINATE, loader=loader, reproducible=False)
    job.train(1)
    job.session.save(folder / "kept" / "000001-step-6").result()
    job.session.close()
    again = Slow()
    job = Job(rank, size, folder, loader=again, reproducible=False, resume=True)
    states = []
    for step in range(4):
        if step == 1 + rank:  # one after the other
            again.let()
        job.step(job.rows(step))
        states.append(job.sites()["2"])
    job.session.close()
    return states


# -- interrupted runs ---------------------------------------------------------------------


def interrupted(
    rank: int, size: int, folder: Path, kind: str, *, resume: bool = False, kill_at: int = -1,
    epochs: int = 8
) -> Any:
    job = Job(rank, size, folder, kind=kind, resume=resume, every_steps=4)
    session, keeper = job.session, job.session.checkpoints
    begun = {"step": session.growth.step, "batch": session.batch, "state": job.state()}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss = job.loss(model, batch)
        if model.training:
            assert keeper is not None
            keeper.wait()  # so that none is left out
            if rank == 1 and session.growth.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            job.losses.append(f"{session.growth.step} {float(loss.detach()).hex()}")
        return loss

    data = TensorDataset(*(t[: STEPS * 4 * BATCH] for t in job.data))
    order = DistributedSampler(data, num_replicas=size, rank=rank, shuffle=True)
    Trainer(job.model, job.optimizer, loss_fn, DataLoader(data, 4 * BATCH // size, sampler=order),
            session).fit(epochs)
    session.close()
    return {"begun": begun, "losses": job.losses, "state": job.state(), "sites": job.sites(),
            "holdout": [v.hex() for v in job.session._holdout_losses]}


def refused(rank: int, size: int, folder: Path) -> Any:
    """The messages of what cannot be done."""
    said = {}

    def attempt(name: str, what: Any) -> None:
        try:
            what()
        except EsperError as e:
            said[name] = f"{type(e).__name__}: {e}"

    def session(model: nn.Module, optimizer: Any = None, held: int = 1, **options: Any) -> Session:
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
        return Session(model, optimizer, loss_fn=lambda m, b: m(b).sum(),
                       holdout=[torch.randn(2, 16)] * held, **options)

    def wrapped() -> nn.Module:
        return kasmina.wrap(mlp(), sites=["1"], example=torch.randn(2, 16))

    for kind in ("ddp", "fsdp"):
        attempt(f"{kind} first", lambda kind=kind: kasmina.wrap(parallel(mlp(), kind, size), ["1"]))
    attempt("plain", lambda: session(wrapped()))
    attempt("holdout", lambda: session(parallel(wrapped(), "ddp", size), held=1 + rank))
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempt("optimizer", lambda: session(parallel(model, "fsdp", size), optimizer))
    grown = wrapped()
    kasmina.growth_of(grown).obey(command(Action.GERMINATE, "1"), ReadyLoader())  # type: ignore[arg-type]
    attempt("grown", lambda: session(parallel(grown, "ddp", size)))
    odd = session(parallel(wrapped(), "ddp", size))
    if rank:
        odd.growth.germinated = 1
        odd.growth.sites["1"].resting = SeedState.CULLED
    attempt("otherwise", odd.epoch)
    return said


def scaled(rank: int, size: int, folder: Path) -> Any:
    """With a GradScaler, and a seed whose gradient is infinite on the last rank alone, once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    job = Job(rank, size, folder, script=GERMINATE, scaler=scaler)
    session, seen = job.session, []
    for step in range(3 * STEPS):
        if step == 2 * STEPS + 2:
            (seed,) = session.growth.active()
            if rank == size - 1:
                poison = seed.params[0].register_hook(lambda g: g * float("inf"))
        job.optimizer.zero_grad()
        loss = job.loss(job.model, job.rows(step % STEPS))
        scaler.scale(loss).backward()
        scaler.unscale_(job.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        scaler.step(job.optimizer)
        scaler.update()
        session.step(loss)
        if step == 2 * STEPS + 2 and rank == size - 1:
            poison.remove()
        seen.append([bool(norm.isfinite()), scaler.get_scale(), session.growth.step,
                     hash(tuple(p.flatten()[0].item() for p in job.model.parameters()))])
        if step % STEPS == STEPS - 1:
            session.epoch()
    session.close()
    return seen
