"""Files that outlive who writes them: what is on the disk for good, what the dead left there."""

from __future__ import annotations

import os
import platform
import time
import uuid
from pathlib import Path

import psutil

FORGOTTEN_SECONDS = 86_400.0  # far beyond what any writer takes


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk before this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def temporary_name() -> str:
    """A name that is used once, and by which `abandoned` tells whose it is."""
    return f"{os.getpid()}-{platform.node()}-{uuid.uuid4().hex}"


def abandoned(path: Path, prefix: str = "") -> bool:
    """Whether nobody works on `path` any more, which is called `prefix` and a `temporary_name`.

    Its process is looked for. One on another machine, or in another container, cannot be seen from
    here, though its home may be shared with this one: what is such a process's is abandoned when
    nothing in it was changed for a day.
    """
    pid, _, rest = path.name.removeprefix(prefix).partition("-")
    if pid.isdigit() and rest.rpartition("-")[0] == platform.node():
        return not psutil.pid_exists(int(pid))
    try:
        return time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS
    except OSError:  # gone meanwhile
        return False
