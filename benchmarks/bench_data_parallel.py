"""A step of two processes under DistributedDataParallel, with a session and without.

    python -m benchmarks.bench_data_parallel RANK FOLDER    # what each process runs
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from benchmarks.bench_dormant import Block
from benchmarks.pairs import Pair, note

ROUNDS, STEPS, RANKS = 60, 20, 2


def test_step_of_two_processes(benchmark: Any, tmp_path: Path) -> None:
    """With nothing growing: what a session adds is one small message every 20th step."""
    taken = benchmark.pedantic(lambda: _both(tmp_path), rounds=1)
    note(benchmark, Pair(tuple(taken["session"]), tuple(taken["plain"])), target="<= 1.01")


def _both(folder: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.bench_data_parallel"]
    processes = [subprocess.Popen([*command, str(r), str(folder)]) for r in range(RANKS)]
    assert [p.wait(600) for p in processes] == [0] * RANKS
    return json.loads((folder / "taken.json").read_text())


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=RANKS)
    torch.manual_seed(0)
    inner = nn.Sequential(*[Block(256) for _ in range(12)], nn.Linear(256, 10))
    x, y = torch.randn(64, 256), torch.randint(0, 10, (64,))
    esper.wrap(inner, sites=[str(i) for i in range(12)], example=x)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss_fn(of: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(of(batch[0]), batch[1])

    def seconds(after: Callable[[torch.Tensor], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model, (x, y))
            loss.backward()
            optimizer.step()
            after(loss)
        return (time.perf_counter() - start) / STEPS

    def with_session() -> float:
        with esper.Session(model, optimizer, loss_fn=loss_fn, holdout=[(x, y)]) as session:
            seconds(session.step)  # its snapshot has just gone through the caches
            return seconds(session.step)

    def plain() -> float:
        # The plain loop looks at its loss too, as every real one does.
        seconds(lambda loss: float(loss.detach()))
        return seconds(lambda loss: float(loss.detach()))

    sides = {"session": with_session, "plain": plain}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(sides), 2):
            taken[name].append(sides[name]())
    if rank == 0:
        (folder / "taken.json").write_text(json.dumps(taken))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), Path(sys.argv[2]))
