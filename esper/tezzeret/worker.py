"""Compiling in a process that can be killed: the owner's side of the forge."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from esper.errors import CompileError
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.tezzeret.forge import ARTIFACT
from esper.tezzeret.pipelines import RECIPES

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
    for old in cache.glob("item-*"):
        owner = old.name.split("-")[1]
        if not (owner.isdigit() and psutil.pid_exists(int(owner))):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"item-{os.getpid()}-", dir=cache))


class Stopwatch:
    """Time that counts against a deadline: what a process and its descendants spent running or
    asleep, not what they spent waiting for a core.

    At idle priority beside a busy trainer they may wait for minutes, and that is no fault of the
    blueprint's. One that hangs sleeps, so its time counts in full.
    """

    EVERY = 0.5  # seconds between two looks; between them nothing is known

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._counted = 0.0
        self._last, (self._used, _) = time.monotonic(), self._family()

    def seconds(self) -> float:
        now = time.monotonic()
        passed = now - self._last
        if passed >= self.EVERY:
            used, ready = self._family()
            # Ready to run and not running is waiting; several may run at once.
            self._counted += min(passed, max(0.0, used - self._used)) if ready else passed
            self._last, self._used = now, used
        return self._counted

    def _family(self) -> tuple[float, bool]:
        """(processor seconds of all, those that ended included; whether one is ready to run)."""
        used, ready = 0.0, False
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                    times = process.cpu_times()
                    used += times.user + times.system
                    used += times.children_user + times.children_system
                    ready |= process.status() == psutil.STATUS_RUNNING
        return used, ready


class Forge:
    """One forge process, started when first needed and again after it had to be killed.

    Not thread-safe: one compile at a time. The process stays in its owner's session, for
    idle priority counts only within one, and dies with the thread that started it. It leads
    a process group, so that compilers it started are found even when it has died itself.
    """

    def __init__(self) -> None:
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
            CompileError: it failed, crashed, was cancelled, or took longer than
                `deadline_seconds` (by default the pipeline's; see `Stopwatch`), with the
                compiler's last words. Nothing is left running.
        """
        if deadline_seconds is None:
            deadline_seconds = RECIPES[pipeline].deadline_seconds
        self.start(cancelled)
        folder = _item_folder()
        try:
            request = {"blueprint": ir.to_json(), "signature": signature.model_dump_json(),
                       "pipeline": pipeline, "folder": str(folder)}
            self._send(json.dumps(request))
            answer = json.loads(self._wait(deadline_seconds, "compile", cancelled))
            if answer["error"]:
                raise CompileError(f"{ir.id} {pipeline}: {answer['error'][-2000:]}")
            return (folder / ARTIFACT).read_bytes()
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
        environment = dict(os.environ, TMPDIR=str(_private_cache()), OMP_NUM_THREADS="1",
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
        self._wait(START_SECONDS, "start", cancelled)

    @property
    def pid(self) -> int | None:
        """The process id of the forge, None where there is none."""
        return self._process.pid if self._process is not None else None

    def _send(self, request: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead forge answers with silence
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()

    def _wait(self, seconds: float, what: str, cancelled: Callable[[], bool]) -> str:
        assert self._process is not None
        watch = Stopwatch(self._process.pid)
        while True:
            left = seconds - watch.seconds()
            if left <= 0 or cancelled():
                self.close()
                why = (f"within {seconds:g} s (not counting waits for a core)" if left <= 0
                       else "before it was cancelled")
                raise CompileError(
                    f"the forge did not {what} {why}; it and all it had started were killed"
                )
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
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # in one go: nobody forks away meanwhile
        for member in family:  # should one have left the group
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        status = process.wait()
        psutil.wait_procs(family, timeout=5)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        return status

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")
