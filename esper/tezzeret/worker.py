"""Compiling in a process that can be killed: the owner's side of the forge."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from esper.errors import CompileError
from esper.files import abandoned, temporary_name
from esper.leyline.artifact import MAX_LIBRARY_BYTES, Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.sandbox.allowance import Allowance
from esper.sandbox.layers import Layer
from esper.sandbox.probe import describe
from esper.sandbox.watch import Watch, end_family, read_capped
from esper.tezzeret.forge import ARTIFACT
from esper.tezzeret.pipelines import RECIPES

log = logging.getLogger(__name__)
ALLOWANCE = Allowance(memory_bytes=12 << 30)  # of one compile
_ITEM = "item-"
_MAX_ARTIFACT_BYTES = 2 * MAX_LIBRARY_BYTES + (4 << 20)
START_SECONDS = 120.0  # importing torch on a machine that has better things to do


def _private_cache() -> Path:
    """Where precompiled headers are kept between blueprints; only this user can enter."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "esper" / "forge"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def _item_folder() -> Path:
    """A fresh folder for one blueprint; those of owners that were killed are swept away."""
    cache = _private_cache()
    for old in cache.glob(f"{_ITEM}*"):
        if abandoned(old, _ITEM):
            shutil.rmtree(old, ignore_errors=True)
    folder = cache / f"{_ITEM}{temporary_name()}"
    folder.mkdir(mode=0o700)
    return folder


class Forge:
    """One forge process, started when first needed and again after it had to be killed.

    Not thread-safe: one compile at a time. The process stays in its owner's session, for
    idle priority counts only within one, and dies with the thread that started it. It leads
    a process group, so that compilers it started are found even when it has died itself.
    """

    def __init__(self, allowance: Allowance = ALLOWANCE) -> None:
        self._allowance = allowance
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def compile(
        self,
        ir: BlueprintIR,
        signature: SiteSignature,
        pipeline: Pipeline,
        deadline_seconds: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """The artifact of a blueprint; it must have passed `analysis.analyse`.

        Raises:
            CompileError: it failed, crashed, was cancelled, took more than its allowance, or
                longer than `deadline_seconds` (by default the pipeline's; see `Watch`). It
                begins with what happened and ends with the compiler's last words. Nothing is
                left running.
        """
        if deadline_seconds is None:
            deadline_seconds = RECIPES[pipeline].deadline_seconds
        self.start(cancelled)
        folder = _item_folder()
        try:
            request = {"blueprint": ir.to_json(), "signature": signature.model_dump_json(),
                       "pipeline": pipeline, "folder": str(folder),
                       "allowance": asdict(self._allowance)}
            self._send(json.dumps(request))
            answer = json.loads(self._wait(deadline_seconds, "compile", cancelled, [folder]))
            if answer["error"]:
                raise CompileError(f"{ir.id} {pipeline}: {_short(answer['error'])}")
            try:
                return read_capped(folder / ARTIFACT, _MAX_ARTIFACT_BYTES)
            except OSError as e:
                raise CompileError(f"{ir.id} {pipeline}: no artifact to be used: {e}") from e
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Start the process where none is alive; returns when it is warm.

        Raises:
            CompileError: it could not be started, which is no blueprint's fault.
        """
        if self._process is not None:
            # Looked at without reaping: while it is unreaped, its group's id is nobody else's.
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self._process.pid, look) is None:
                return
            self.close()
        # Not an item's: what is known of this machine and its headers, for all that follow.
        shared = _private_cache() / "shared"
        shared.mkdir(exist_ok=True)
        environment = dict(os.environ, TMPDIR=str(shared), OMP_NUM_THREADS="1",
                           PYTHONWARNINGS="ignore::FutureWarning",
                           TORCHINDUCTOR_COMPILE_THREADS="1")  # no pool: the forge forks
        # Where Inductor keeps what it knows of this machine: by default below TMPDIR.
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "esper.tezzeret.forge", str(os.getpid())],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            process_group=0,
        )
        threading.Thread(
            target=_pass_on, args=(self._process, self._answers), daemon=True
        ).start()
        layers = json.loads(self._wait(START_SECONDS, "start", cancelled))["layers"]
        log.info("compiles are shut in: %s", describe({Layer(n): w for n, w in layers.items()}))

    @property
    def pid(self) -> int | None:
        """The process id of the forge, None where there is none."""
        return self._process.pid if self._process is not None else None

    def _send(self, request: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead forge answers with silence
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()

    def _wait(
        self, seconds: float, what: str, cancelled: Callable[[], bool],
        folders: Sequence[Path] = (),
    ) -> str:
        assert self._process is not None
        watch = Watch(self._process.pid, self._allowance, folders)
        while True:
            left = seconds - watch.seconds()
            excess = watch.excess()
            if left <= 0 or excess or cancelled():
                self.close()
                why = (f"did not {what} within {seconds:g} s (not counting waits for a core)"
                       if left <= 0 else excess or f"did not {what} before it was cancelled")
                raise CompileError(f"the forge {why}; it and all it had started were killed")
            with contextlib.suppress(queue.Empty):
                line = self._answers.get(timeout=min(left, 0.2))
                break
        if not line:
            status = self.close()
            raise CompileError(
                f"the forge ended (status {status}) before it could {what}; a negative status "
                "is the signal that killed it, -9 often a lack of memory"
            )
        return line

    def close(self) -> int | None:
        """Kill the forge with every descendant; its exit status. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return None
        end_family(process.pid)
        status = process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        return status

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _short(error: str) -> str:
    """What happened, and the last words: the middle of a long error is left out."""
    return error if len(error) <= 2000 else f"{error[:300]}\n...\n{error[-1700:]}"


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")
