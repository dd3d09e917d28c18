"""The owner's watch over foreign work, on real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from esper.sandbox.allowance import Allowance
from esper.sandbox.watch import Family, Watch, end_family, read_capped, read_tail


def test_waiting_for_a_core_is_no_time_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "EVERY", 0.05)
    seen = [Family()]
    monkeypatch.setattr(Watch, "_look", lambda self: seen[0])
    watch = Watch(os.getpid())

    def after(seconds: float, used: float, ready: bool) -> float:
        seen[0] = Family(used, ready)
        time.sleep(seconds)
        return watch.seconds()

    assert after(0.2, used=0.0, ready=True) == 0, "starved"
    assert after(0.2, used=0.03, ready=True) == pytest.approx(0.03), "a little of a core"
    assert after(0.2, used=9.0, ready=True) < 8, "on many cores it is the time that counts"
    before = watch.seconds()
    assert after(0.2, used=9.0, ready=False) >= before + 0.2, "asleep"


def test_a_process_that_sleeps_is_timed_in_full_with_its_children() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', %r])"
    spin = "while True: pass"
    for inner, least in ((spin, 0.0), ("import time; time.sleep(60)", 1.0)):
        with running(program % inner) as process:
            while not psutil.Process(process.pid).children():
                time.sleep(0.05)
            time.sleep(1.0)  # for the child to have started
            watch = Watch(process.pid)
            time.sleep(1.2)
            (child,) = psutil.Process(process.pid).children()
            assert watch.seconds() >= least
            if inner is spin:
                assert watch.seconds() <= child.cpu_times().user + child.cpu_times().system + 0.2
                assert watch.seconds() > 0


@contextmanager
def running(program: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", program], process_group=0, cwd=cwd)
    try:
        yield process
    finally:
        end_family(process.pid)
        process.wait()


FORKS = """
import subprocess, sys, time
kept = [subprocess.Popen(["sleep", "600"]) for _ in range(8)]
time.sleep(600)
"""
# No single process has much; together they have.
EATS = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        kept = bytearray(os.urandom(1) * (60 << 20))
        time.sleep(600)
time.sleep(600)
"""
WRITES = """
import time
for n in range(30):
    open(f"file{n}", "wb").write(bytes(1 << 20))
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (FORKS, "started more than 5 processes"),
        (EATS, r"ran out of memory \(limit 150 MiB, all processes together\)"),
        (WRITES, "wrote more than 20 MiB to its folder"),
    ],
)
def test_what_all_of_them_take_together_is_seen(tmp_path: Path, program: str, says: str) -> None:
    most = Allowance(memory_bytes=150 << 20, disk_bytes=20 << 20, processes=5)
    with running(program, tmp_path) as process:
        watch = Watch(process.pid, most, [tmp_path])
        end = time.monotonic() + 60
        while not watch.excess() and time.monotonic() < end:
            watch.seconds()
            time.sleep(0.05)
        assert re.fullmatch(says, watch.excess())


def test_memory_that_forks_have_in_common_counts_once() -> None:
    share = (
        "import os, time\nkept = bytearray(os.urandom(1) * (60 << 20))\n"
        "for _ in range(4):\n    if os.fork() == 0: time.sleep(600)\n"
        "time.sleep(600)"
    )
    with running(share) as process:
        while len(psutil.Process(process.pid).children()) < 4:
            time.sleep(0.05)
        watch = Watch(process.pid, Allowance(memory_bytes=200 << 20))
        assert not watch.excess()


def test_the_end_of_a_family_takes_in_those_that_left_the_group() -> None:
    leave = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    with running(f"{leave}; time.sleep(600)") as process:
        while not (found := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        end_family(process.pid)
        assert not [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_what_foreign_work_wrote_is_read_up_to_a_limit_and_only_from_plain_files(
    tmp_path: Path,
) -> None:
    plain, link, pipe = tmp_path / "plain", tmp_path / "link", tmp_path / "pipe"
    plain.write_bytes(b"0123456789")
    link.symlink_to(plain)
    os.mkfifo(pipe)
    assert read_capped(plain, 10) == b"0123456789"
    with pytest.raises(OSError, match="more than 9 bytes"):
        read_capped(plain, 9)
    for other in (link, pipe, tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError):
            read_capped(other, 10)
        assert read_tail(other, 10) == ""
    assert read_tail(plain, 4) == "6789" and read_tail(plain, 40) == "0123456789"
