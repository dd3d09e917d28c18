"""Runs in processes of their own, so many at a time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

K = TypeVar("K")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job(Generic[K]):
    """A command whose output goes to `log`."""

    key: K
    command: Sequence[str]
    log: Path


def run_all(
    jobs: Sequence[Job[K]], at_once: int, *, started: Callable[[K], None],
    ended: Callable[[K, int], None], tick: Callable[[], None] = lambda: None,
) -> None:
    """Run them in order, `at_once` at a time, on one thread each; whatever ends this ends them.

    `ended` is given the exit code, negative for a signal.
    """
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **single}
    waiting, running = list(jobs), dict[int, tuple[Job[K], subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                process = _start(job, environment)
                running[process.pid] = job, process
                started(job.key)
            for pid, (job, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[pid]
                    ended(job.key, code)
            tick()
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


def _start(job: Job[K], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=environment)
