"""Compiling in a process that can be killed: the owner's side of the forge."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
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


class Forge:
    """One forge process, started when first needed and again after it had to be killed.

    Not thread-safe: one compile at a time. The process stays in its owner's session, for
    idle priority counts only within one, and dies with its owner.
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
    ) -> bytes:
        """The artifact of a blueprint; it must have passed `analysis.analyse`.

        Raises:
            CompileError: it failed, crashed, or took longer than `deadline_seconds` (by
                default the pipeline's), with the compiler's last words. Nothing is left
                running.
        """
        deadline = deadline_seconds or RECIPES[pipeline].deadline_seconds
        self._start()
        folder = Path(tempfile.mkdtemp(prefix="item-", dir=_private_cache()))
        try:
            request = {"blueprint": ir.to_json(), "signature": signature.model_dump_json(),
                       "pipeline": pipeline, "folder": str(folder)}
            answer = json.loads(self._ask(json.dumps(request), deadline))
            if answer["error"]:
                raise CompileError(f"{ir.id} {pipeline}: {answer['error'][-2000:]}")
            return (folder / ARTIFACT).read_bytes()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        environment = dict(os.environ, TMPDIR=str(_private_cache()), OMP_NUM_THREADS="1",
                           PYTHONWARNINGS="ignore::FutureWarning",
                           TORCHINDUCTOR_COMPILE_THREADS="1")  # no pool: the forge forks
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "esper.tezzeret.forge"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        threading.Thread(
            target=_pass_on, args=(self._process, self._answers), daemon=True
        ).start()
        self._wait(START_SECONDS, "start")

    def _ask(self, request: str, deadline: float) -> str:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead forge answers with silence below
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        return self._wait(deadline, "compile")

    def _wait(self, seconds: float, what: str) -> str:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise CompileError(
                f"the forge did not {what} within {seconds:g} s; it and all it had started "
                "were killed"
            ) from None
        if not line:
            code = self._process.poll() if self._process else None
            self.close()
            raise CompileError(f"the forge ended (status {code}) before it could {what}")
        return line

    def close(self) -> None:
        """Kill the forge with every descendant; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=5)

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")
