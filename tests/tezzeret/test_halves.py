"""The forge's children: what runs at the same time ends at the same time."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from esper.sandbox.allowance import Allowance
from esper.tezzeret.children import in_children

MOST = Allowance(memory_bytes=1 << 30)


def test_the_first_half_that_fails_ends_the_other_and_its_compiler(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def fails() -> None:
        while not started.exists():
            time.sleep(0.01)
        raise MemoryError

    def compiles() -> None:
        with subprocess.Popen(["sleep", "600"]) as compiler:
            (tmp_path / "part").write_text(str(compiler.pid))
            (tmp_path / "part").rename(started)

    for first in (True, False):
        halves = {"forward": fails, "backward": compiles}
        error = in_children(halves if first else dict(reversed(halves.items())), tmp_path, MOST)
        assert error.splitlines()[0] == "ran out of memory (limit 1 GiB)"
        assert not psutil.pid_exists(int(started.read_text())) or (
            psutil.Process(int(started.read_text())).status() == psutil.STATUS_ZOMBIE)
        started.unlink()


def test_both_halves_are_waited_for(tmp_path: Path) -> None:
    def writes(name: str) -> None:
        time.sleep(0.2)
        (tmp_path / name).touch()

    assert in_children({n: lambda n=n: writes(n) for n in "ab"}, tmp_path, MOST) == ""  # type: ignore[misc]
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()
    assert in_children({"a": lambda: exit(3)}, tmp_path, MOST).startswith("SystemExit")
