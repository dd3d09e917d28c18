"""Runs of several real processes: `launch` starts them, a scenario says what each of them does.

They come from a fork server that has imported torch already, which saves seconds for each.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper.kasmina.growth as kasmina
from esper.leyline.command import Action
from esper.tamiyo.state import Catalog, Decision, SystemState
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.session import Session
from esper.tolaria.sharded import whole
from esper.urza.library import LocalLibrary
from tests.support import ResidualBlock, command
from tests.tolaria.runs import SCRIPT, ready_kernels

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 6, 4  # in an epoch; of one rank
DEADLINE = 240.0


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit code, what the scenario returned, or what it raised."""

    code: int
    result: Any
    error: str


def launch(scenario: Callable[..., Any], size: int, folder: Path, **options: Any) -> list[Ended]:
    """Run `scenario(rank, size, folder, **options)` in `size` processes of one gloo group."""
    folder.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tolaria.teamwork", "tests.tolaria.scenarios"])
    place = folder / f"meet-{time.monotonic_ns()}"
    place.mkdir()
    processes = [context.Process(target=_process, args=(scenario, r, size, folder, place, options))
                 for r in range(size)]
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for the fork server
        for p in processes:
            p.start()
    end = time.monotonic() + DEADLINE
    for p in processes:
        p.join(max(0.0, end - time.monotonic()))
    hung = [r for r, p in enumerate(processes) if p.is_alive()]
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    ended = []
    for rank, p in enumerate(processes):
        said, error = place / f"{rank}.json", place / f"{rank}.error"
        ended.append(Ended(p.exitcode, json.loads(said.read_text()) if said.exists() else None,
                           error.read_text() if error.exists() else ""))
    assert not hung, f"ranks {hung} did not end: {[e.error for e in ended]}"
    return ended


def results(ended: list[Ended]) -> list[Any]:
    assert all(e.code == 0 for e in ended), "\n".join(e.error for e in ended)
    return [e.result for e in ended]


def _process(
    scenario: Callable[..., Any], rank: int, size: int, folder: Path, place: Path, options: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank,
                                world_size=size, timeout=timedelta(seconds=90))
    try:
        result = scenario(rank, size, folder, **options)
        (place / f"{rank}.json").write_text(json.dumps(result))
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (place / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def parallel(model: nn.Module, kind: str, size: int, **options: Any) -> nn.Module:
    if size == 1:
        return model
    if kind in ("ddp", "compiled"):
        return DistributedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (size,))
    for child in model.children():
        if isinstance(child, ResidualBlock) or (kind == "layers" and list(child.parameters())):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class ByEpoch:
    """Commands by epoch, on the rank that decides; any other is never asked."""

    def __init__(self, script: dict[int, list[tuple[Action, str]]] = SCRIPT) -> None:
        self.script = script
        self.asked = 0

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        self.asked += 1
        return Decision(tuple(command(a, s) for a, s in self.script.get(state.epoch, [])))


class Job:
    """One rank's part of a run that grows by a script, on its own part of the data."""

    def __init__(
        self, rank: int, size: int, folder: Path, *, kind: str = "ddp", resume: bool = False,
        every_steps: int | None = None, script: Any = SCRIPT, loader: Any = None, **options: Any
    ) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), ResidualBlock(8), ResidualBlock(8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 10))
        kasmina.wrap(model, sites=["2", "3"], example=torch.randn(2, 1, 8, 8))
        self.model = parallel(model, kind, size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        torch.manual_seed(100 + rank)  # dropout differs from rank to rank
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(64 * (STEPS + 1), 1, 8, 8, generator=generator)
        self.data = x, torch.randint(0, 10, (len(x),), generator=generator)
        self.records: list[Any] = []
        self.losses: list[str] = []
        self.policy = ByEpoch(script)
        self.nan_at = -1
        kept = None if every_steps is None else Checkpoints(
            folder / "kept", every_steps=every_steps, every_epochs=None, keep=1000)
        given: dict[str, Any] = {
            "loss_fn": self.loss, "holdout": [self.rows(STEPS)], "policy": self.policy,
            "library": LocalLibrary(folder / "library"), "checkpoints": kept,
            "reproducible": True, "observers": [self.records.append], "lr_scale": 0.5,
            "warm_up": 5, **options}
        with ready_kernels(loader):
            make = Session if not resume else Session.resume
            first = () if not resume else (folder / "kept",)
            self.session = make(*first, self.model, self.optimizer, **given)
        self.session.growth.graft_steps, self.session.growth.embargo_epochs = 8, 1

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the batch of one step; all of it is the same for any size."""
        x, y = (t[64 * step : 64 * (step + 1)][: BATCH * 4] for t in self.data)
        return x[self.rank :: self.size], y[self.rank :: self.size]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def train(self, epochs: int) -> Job:
        for _ in range(self.session.growth.epoch, epochs):
            for step in range(self.session.batch, STEPS):
                self.step(self.rows(step))
            self.session.epoch()
        return self

    def step(self, batch: Any) -> None:
        session = self.session
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch)
        self.losses.append(f"{session.growth.step} {float(loss.detach()).hex()}")
        if session.growth.step == self.nan_at:
            self.nan_at, loss = -1, loss * float("nan")
        loss.backward()
        self.optimizer.step()
        session.step(loss)

    def state(self) -> dict[str, str]:
        """SHA-256 of every parameter, buffer, and its optimizer state, whole."""
        names = self.session.parts.names()
        found = {name: whole(tensor.detach()) for tensor, name in names.items()}
        for p, held in self.optimizer.state.items():
            found.update({f"{names[p]}/{k}": whole(v) for k, v in held.items()})
        return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
                for name, t in found.items()}

    def sites(self) -> dict[str, str]:
        return {name: str(site.state) for name, site in self.session.growth.sites.items()}
