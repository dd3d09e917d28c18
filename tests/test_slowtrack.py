"""The slow track's processes: started with the run, idle, and gone when the trainer is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from esper.leyline.artifact import Pipeline
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.rpc.address import parse_address
from esper.rpc.server import Server
from esper.slowtrack import SlowTrack
from esper.urza.library import LocalLibrary
from tests.support import bottleneck

TRAINER = """
import sys, time
from esper.slowtrack import SlowTrack
track = SlowTrack(sys.argv[1]).start()
print(track.pid, flush=True)
time.sleep(600)
"""


def wait_until(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def services_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def compiles(pid: int) -> bool:
    for process in services_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the looks
            if process.name() in ("cc1plus", "g++"):
                return True
    return False


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_orphan(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.register_signature(SiteSignature(kind=SiteKind.FEATURES, channels=16))
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)],
                               stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    supervisor = int(trainer.stdout.readline())
    assert wait_until(lambda: len(services_of(supervisor)) >= 3, 120)
    # Until a compiler runs, the hardest thing to clean up after is not there yet.
    assert wait_until(
        lambda: compiles(supervisor), 120
    ), (tmp_path / "slowtrack.log").read_text()
    family = [psutil.Process(supervisor), *services_of(supervisor)]
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    _gone, left = psutil.wait_procs(family, timeout=60)
    assert not left, [p.cmdline() for p in left]
    here = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"])
                if here in " ".join(p.info["cmdline"] or [])]


FORKING_TRAINER = """
import os, sys, time
from esper.slowtrack import SlowTrack
track = SlowTrack(sys.argv[1]).start()
worker = os.fork()
if worker == 0:
    time.sleep(600)
print(track.pid, worker, flush=True)
if sys.stdin.readline():
    track.stop()
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_a_process_that_the_trainer_forked_keeps_nothing_alive(tmp_path: Path, ends: str) -> None:
    """It inherits the pipe, so the pipe alone does not tell the supervisor."""
    trainer = subprocess.Popen([sys.executable, "-c", FORKING_TRAINER, str(tmp_path)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdin is not None
    supervisor, worker = map(int, trainer.stdout.readline().split())
    try:
        assert wait_until(lambda: len(services_of(supervisor)) >= 3, 120)
        family = [psutil.Process(supervisor), *services_of(supervisor)]
        start = time.monotonic()
        if ends == "stop":
            print("now", file=trainer.stdin, flush=True)
            assert trainer.stdout.readline() == "stopped\n"
            # Past ten seconds `stop` gives up asking and kills.
            assert time.monotonic() - start < 9
        else:
            trainer.kill()
        trainer.wait()
        assert not psutil.wait_procs(family, timeout=60)[1]
        assert psutil.pid_exists(worker), "the test is about a worker that is still there"
    finally:
        os.kill(worker, signal.SIGKILL)
        trainer.kill()


def test_services_run_idle_in_the_trainers_session_and_stop_with_it(tmp_path: Path) -> None:
    with SlowTrack(tmp_path) as track:
        assert track.pid is not None
        pid = track.pid
        assert wait_until(lambda: len(services_of(pid)) >= 3, 120)
        family = [psutil.Process(pid), *services_of(pid)]
        for process in family:
            assert os.getsid(process.pid) == os.getsid(0)
            assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    assert not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.slow
def test_the_end_of_a_run_gives_back_what_was_being_compiled(tmp_path: Path) -> None:
    """The services end their own children: told at the same time, a compiler that was ended would
    look like one that failed."""
    library, ir = LocalLibrary(tmp_path), bottleneck(SiteKind.FEATURES)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=16)
    library.submit(ir, signature, author="test", pipeline=Pipeline.AGGRESSIVE)
    # Idle services have no say in when they end where somebody else keeps the cores busy.
    with SlowTrack(tmp_path, priority="normal") as track:
        assert track.pid is not None
        pid = track.pid
        assert wait_until(lambda: library.leases() and compiles(pid), 240), (
            tmp_path / "slowtrack.log").read_text()
    (record,) = library.blueprints()
    assert record.status is BlueprintStatus.UNVALIDATED
    assert record.reason == "released by tezzeret-0" and not library.leases()


def test_services_work_for_a_library_behind_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = LocalLibrary(tmp_path / "library")
    library.register_signature(SiteSignature(kind=SiteKind.FEATURES, channels=16))
    address = parse_address(f"unix:{tmp_path}/urza.sock")
    log = tmp_path / "log"
    with Server(library, address), SlowTrack(str(address), log_file=log):
        # Karn needs nothing but the library.
        assert wait_until(library.blueprints, 60), log.read_text()
    assert library.blueprints()[0].author == "karn/template"


def test_a_service_that_dies_is_started_again(tmp_path: Path) -> None:
    with SlowTrack(tmp_path) as track:
        pid = track.pid
        assert pid is not None and wait_until(lambda: len(services_of(pid)) >= 3, 120)

        def karn() -> psutil.Process | None:
            for process in services_of(pid):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the looks
                    if (process.status() != psutil.STATUS_ZOMBIE
                            and "karn" in process.cmdline()):
                        return process
            return None

        first = karn()
        assert first is not None
        first.kill()
        assert wait_until(lambda: (p := karn()) is not None and p.pid != first.pid, 120)


def test_a_signal_in_the_middle_of_a_wait_does_not_deadlock() -> None:
    """The handler runs while the main thread holds the lock of the Event that it waits for."""
    code = """
import os, signal
from esper.slowtrack import stop_on
stop = stop_on(signal.SIGTERM)
with stop._cond:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass
print(stop.wait(30))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_a_second_signal_ends_a_process_that_does_not_stop() -> None:
    code = """
import os, signal
from esper.slowtrack import stop_on
stop = stop_on(signal.SIGTERM, signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
print(stop.wait(30), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("True\n", -signal.SIGTERM), done.stderr
