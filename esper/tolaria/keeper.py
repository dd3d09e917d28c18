"""Automatic checkpoints: when one is due, written by a thread, the last few kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from esper.errors import CheckpointError, ContractError
from esper.tolaria.checkpoint import NAME, checkpoints_in, discard, sweep

log = logging.getLogger(__name__)

Write = Callable[[Path], Path]


class Checkpoints:
    """Give one to `Session(checkpoints=...)` and the run can be killed at any moment.

    Args:
        folder: where they go, each a folder NNNNNN-step-STEP; created where missing.
        every_steps, every_epochs: how often; None is never.
        keep: how many stay; older ones are removed once a newer one is durable.

    A checkpoint that cannot be written (a full disk) is logged and the training goes on. One that
    is due while the last is still being written is left out, so that a slow disk never holds up a
    step. Owned by the training thread.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, every_steps: int | None = None,
        every_epochs: int | None = 1, keep: int = 3,
    ) -> None:
        for name, value in (("every_steps", every_steps), ("every_epochs", every_epochs),
                            ("keep", keep)):
            if value is not None and value < 1:
                raise ContractError(f"{name} is {value}; it must be at least 1")
        self.folder, self.keep = Path(folder), keep
        self.every_steps, self.every_epochs = every_steps, every_epochs
        self.left_out = 0  # because the last was still being written
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="esper-checkpoint")
        self._writing: Future[Path] | None = None
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            sweep(self.folder)  # another rank, on another machine, does not see who writes there

    def falls(self, count: int, *, of_epoch: bool = False) -> bool:
        """Whether it is time, after so many steps, or epochs."""
        every = self.every_epochs if of_epoch else self.every_steps
        return every is not None and count % every == 0

    def free(self) -> bool:
        """Whether one that is due can be written; it is counted and left out otherwise."""
        if self._writing is not None and not self._writing.done():
            self.left_out += 1
            log.info("a checkpoint is left out: the last one is still being written")
            return False
        return True

    def submit(self, write: Write, step: int) -> Future[Path]:
        """Have `write(path)` called by the writing thread; the future is done when it is durable.
        Waits for the one before."""
        self.wait()
        listed = checkpoints_in(self.folder)
        match = NAME.fullmatch(listed[-1].name) if listed else None
        path = self.folder / f"{int(match[1]) + 1 if match else 1:06d}-step-{step}"
        self._writing = self._pool.submit(self._write, write, path)
        return self._writing

    def _write(self, write: Write, path: Path) -> Path:
        try:
            write(path)
            for old in checkpoints_in(self.folder)[: -self.keep]:
                discard(old)
        except (CheckpointError, OSError):
            log.warning("no checkpoint %s; the training goes on", path, exc_info=True)
            raise
        return path

    def wait(self) -> None:
        """Until what is being written is durable, or has failed."""
        if self._writing is not None:
            self._writing.exception()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
