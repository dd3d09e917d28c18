"""Whose a temporary file is, and when it is nobody's any more."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from esper.files import FORGOTTEN_SECONDS, abandoned, temporary_name

NAMED = "from esper.files import temporary_name; print(temporary_name())"


def aged(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_what_a_process_of_this_machine_made_is_its_own_until_it_ends(tmp_path: Path) -> None:
    ours = tmp_path / temporary_name()
    ours.mkdir()
    assert not abandoned(aged(ours, 2 * FORGOTTEN_SECONDS)), "however long it takes"
    dead = subprocess.run([sys.executable, "-c", NAMED], capture_output=True, text=True,
                          check=True).stdout.strip()
    (tmp_path / f"item-{dead}").mkdir()
    assert abandoned(tmp_path / f"item-{dead}", "item-")


def test_another_machines_is_left_alone_for_a_day(tmp_path: Path) -> None:
    """A home may be shared, and the other's process has no number here."""
    name = temporary_name().replace(f"-{platform.node()}-", "-another-")
    name = name.replace(str(os.getpid()), "4194305")  # more than there can be here
    there = tmp_path / name
    there.touch()
    assert not abandoned(there)
    assert abandoned(aged(there, FORGOTTEN_SECONDS + 60))
    there.unlink()
    assert not abandoned(there), "who was quicker has removed it"
