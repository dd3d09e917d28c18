"""The slow track: Karn, Tezzeret and Urabrask as child processes beside a training run.

    with SlowTrack("runs/library"):
        train()

One supervisor process stands between the trainer and the services. It holds the read end
of a pipe whose write end the trainer holds: when the trainer goes, however it goes, the
kernel closes the pipe, and the supervisor ends every descendant before itself. What the trainer
forked (workers of a data loader, say) holds that end too, so the supervisor also looks whose
child it is. Should the supervisor be killed, the parent-death signal ends the services.

Everything runs at idle priority *in the trainer's own session*. The kernel groups processes
by session (autogroup), and idle priority counts only inside a group; a session of its own
would give the slow track an equal share of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import psutil

from esper.errors import ContractError
from esper.leyline.library import Library
from esper.rpc.address import is_address, open_library

log = logging.getLogger("esper.slowtrack")

Priority = Literal["idle", "normal"]
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_RESTART_SECONDS = 5.0
_STOP_SECONDS = 4.0  # for the services to give back what they work on


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class SlowTrack:
    """Starts the services on entry and ends them on exit; a context manager. Where several
    processes train one model, that of rank 0 alone has them.

    Args:
        library: folder of the library, created where missing; or the address of an `esper
            serve`, "unix:/path/to.sock" or "host:port".
        tezzeret: number of compile services; Karn and Urabrask run once each.
        priority: "idle" lets the trainer have every cycle it asks for. Where it keeps all
            cores busy, nothing is compiled then: leave a core to the slow track by
            `torch.set_num_threads`, or choose "normal" and share.
        pipeline: FAST, STANDARD or AGGRESSIVE for all new work; None lets Tezzeret choose.
        log_file: where the services write; by default `slowtrack.log` in the library's folder,
            or in the working folder where the library is elsewhere.
        token_file, tls_ca: for host:port, as in `esper.open_library`.
    """

    def __init__(
        self,
        library: str | Path,
        *,
        tezzeret: int = 1,
        priority: Priority = "idle",
        pipeline: str | None = None,
        seed: int = 0,
        log_file: str | Path | None = None,
        token_file: str | Path | None = None,
        tls_ca: str | Path | None = None,
    ) -> None:
        elsewhere = is_address(library)
        # Absolute, so that no folder's name can be taken for an address.
        self.library = str(library) if elsewhere else str(Path(library).absolute())
        self._arguments = ["--tezzeret", str(tezzeret), "--priority", priority,
                           "--seed", str(seed), *_given(pipeline, token_file, tls_ca)]
        home = Path() if elsewhere else Path(library)
        self.log_file = Path(log_file) if log_file else home / "slowtrack.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The supervisor's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> SlowTrack:
        dist = sys.modules.get("torch.distributed")  # who has not imported it is alone
        if dist is not None and dist.is_available() and dist.is_initialized() and dist.get_rank():
            return self
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "esper.slowtrack", "supervise", self.library,
                 "--parent", str(os.getpid()), *self._arguments],
                stdin=subprocess.PIPE, stdout=out, stderr=out,
            )
        return self

    def alive(self) -> bool:
        """Whether the supervisor runs. It starts services that ended again; nobody does so for
        the supervisor itself, so whoever trains for long looks now and then."""
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout: float = 10.0) -> None:
        """Tell the supervisor and wait; kill what is left after `timeout` seconds."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        process.terminate()  # a process that the trainer forked may hold the pipe open
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            end_descendants(process.pid)
            process.kill()
            process.wait()

    def __enter__(self) -> SlowTrack:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _given(
    pipeline: str | None, token_file: str | Path | None, tls_ca: str | Path | None
) -> list[str]:
    given = (("--pipeline", pipeline), ("--token-file", token_file), ("--tls-ca", tls_ca))
    return [word for name, value in given if value for word in (name, str(value))]


def end_descendants(pid: int, grace: float = 1.0) -> None:
    """Terminate, then kill, every descendant of `pid`; returns when they are gone."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            child.terminate()
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(children, timeout=grace)
    for child in left:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=grace)


def _set_priority(priority: Priority) -> None:
    if priority == "idle" and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif priority == "idle":
        os.nice(19)


def _supervise(options: argparse.Namespace) -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of a killed service come to us, to be ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer; the pipe tells us
    told: list[int] = []  # not an Event: setting one from a handler can wait for its own lock
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    _set_priority(options.priority)
    names = ["karn", *(f"tezzeret-{i}" for i in range(options.tezzeret)), "urabrask"]
    running: dict[str, subprocess.Popen[bytes]] = {}
    restart_at: dict[str, float] = {}
    trainer_gone = threading.Event()

    def wait_for_the_trainer() -> None:
        while sys.stdin.buffer.read(1):
            pass
        trainer_gone.set()

    threading.Thread(target=wait_for_the_trainer, daemon=True).start()
    while not (trainer_gone.is_set() or told or os.getppid() != options.parent):
        for name in names:
            process = running.get(name)
            if process is not None and process.poll() is None:
                continue
            if process is not None and name not in restart_at:
                log.warning("%s ended with %s; starting it again", name, process.returncode)
                restart_at[name] = time.monotonic() + _RESTART_SECONDS
            if time.monotonic() >= restart_at.get(name, 0.0):
                restart_at.pop(name, None)
                running[name] = _start_service(name, options)
        _reap(running.values())
        trainer_gone.wait(0.5)
    _stop_services(running.values())
    end_descendants(os.getpid())


Services = Collection[subprocess.Popen[bytes]]


def _reap(services: Services) -> None:
    """Take note of who has ended, the orphans that came to us among them: unreaped they pile up,
    and keep the PID namespace alive that they were in."""
    if sys.platform != "linux":  # there they go to others
        return
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):  # there is none
        while (ended := os.waitid(os.P_ALL, 0, look)) is not None:
            for service in services:
                service.poll()  # else nobody would know its status
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)


def _stop_services(services: Services) -> None:
    """Tell them, and nobody else: each ends what it has started itself, and knows then that this is
    no fault of the work."""
    for service in services:
        service.terminate()
    end = time.monotonic() + _STOP_SECONDS
    while any(s.poll() is None for s in services) and time.monotonic() < end:
        _reap(services)
        time.sleep(0.02)


def _start_service(name: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "esper.slowtrack", "serve", options.library, name,
                 "--seed", str(options.seed), "--parent", str(os.getpid()),
                 *_given(options.pipeline, options.token_file, options.tls_ca)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, env=environment)


def stop_on(*signals: signal.Signals) -> threading.Event:
    """Set by the first of `signals`; a second one ends the process as it always does.

    A thread sets it, told through a pipe that is written to as the signal arrives. A handler in
    Python would not do: it runs in the middle of whatever the main thread does, which may be
    holding the Event's own lock, or not before that thread wakes, where the signal came just
    before it began to wait.
    """
    stop = threading.Event()
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def first(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    def pass_on() -> None:
        while os.read(told, 1)[0] not in signals:
            pass
        stop.set()

    threading.Thread(target=pass_on, name="esper-signals", daemon=True).start()
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for each in signals:
        signal.signal(each, first)
    return stop


def end_with(parent: int) -> None:
    """Be killed as soon as `parent`, which started this process, is gone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was set
        os._exit(1)


def _serve(options: argparse.Namespace) -> None:
    end_with(options.parent)
    stop = stop_on(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    library = open_library(options.library, token_file=options.token_file, tls_ca=options.tls_ca)
    run_service(options.name.partition("-")[0], library, stop, name=options.name,
                seed=options.seed, pipeline=options.pipeline,
                risk_file=None if is_address(options.library)
                else Path(options.library, "risk.json"))


def run_service(
    role: str, library: Library, stop: threading.Event, *, name: str, seed: int = 0,
    pipeline: str | None = None, risk_file: Path | None = None,
) -> None:
    """Be Karn, Tezzeret or Urabrask for `library` until `stop` is set.

    Urabrask writes his risk model, once it is fitted, to `risk_file`.

    Raises:
        CompileError: Tezzeret finds no working C++ compiler.
    """
    match role:
        case "karn":
            from esper.karn import service as karn

            karn.run(library, stop, seed=seed, name=name)
        case "tezzeret":
            from esper.leyline.artifact import Pipeline
            from esper.tezzeret import service as tezzeret

            tezzeret.run(library, stop, worker_name=name,
                         pipeline=Pipeline(pipeline) if pipeline else None)
        case "urabrask":
            from esper.urabrask import service as urabrask

            urabrask.run(library, stop, worker_name=name, risk_file=risk_file)
        case _:
            raise ContractError(f"no service is called {role!r}; karn, tezzeret or urabrask")


def main() -> None:
    """`python -m esper.slowtrack supervise|serve`: the processes behind `SlowTrack`."""
    parser = argparse.ArgumentParser(prog="python -m esper.slowtrack")
    commands = parser.add_subparsers(required=True)
    supervise = commands.add_parser("supervise")
    supervise.add_argument("--tezzeret", type=int, default=1)
    supervise.add_argument("--priority", choices=("idle", "normal"), default="idle")
    supervise.set_defaults(run=_supervise)
    serve = commands.add_parser("serve")
    serve.set_defaults(run=_serve)
    for command in (supervise, serve):
        command.add_argument("library")
        command.add_argument("--parent", type=int, required=True)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--pipeline")
        command.add_argument("--token-file")
        command.add_argument("--tls-ca")
    serve.add_argument("name")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"
    )
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
