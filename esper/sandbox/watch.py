"""The owner's side: how long its foreign work ran, what it takes, its end, what it wrote."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from esper.sandbox.allowance import Allowance, size


@dataclass(frozen=True)
class Family:
    """A process and its descendants at one moment."""

    used: float = 0.0  # processor seconds of all, those that ended included
    ready: bool = False  # whether one runs or waits for a core
    descendants: int = 0
    memory: int = 0  # bytes that are not files' and not shared memory
    disk: int = 0  # bytes in its folders


class Watch:
    """Looks at a process and its descendants, twice a second at most, and only when asked.

    `seconds` is time that counts against a deadline: what they spent running or asleep, not what
    they spent waiting for a core. At idle priority beside a busy trainer that may be minutes, and
    is no fault of the work's. One that hangs sleeps, so its time counts in full.
    """

    EVERY = 0.5  # seconds between two looks; between them nothing is known

    def __init__(
        self, pid: int, allowance: Allowance | None = None, folders: Sequence[Path] = ()
    ) -> None:
        self._pid, self._allowance, self._folders = pid, allowance, folders
        self._counted = 0.0
        self._last, self._family = time.monotonic(), self._look()

    def seconds(self) -> float:
        now = time.monotonic()
        passed = now - self._last
        if passed >= self.EVERY:
            before, self._family = self._family, self._look()
            used = max(0.0, self._family.used - before.used)
            # Ready to run and not running is waiting; several may run at once.
            self._counted += min(passed, used) if self._family.ready else passed
            self._last = now
        return self._counted

    def excess(self) -> str:
        """What of the allowance is overstepped, as of the last look, or ""."""
        if (most := self._allowance) is None:
            return ""
        if self._family.descendants > most.processes:
            return f"started more than {most.processes} processes"
        if self._family.memory > most.memory_bytes:
            return f"ran out of memory (limit {size(most.memory_bytes)}, all processes together)"
        if self._family.disk > most.disk_bytes:
            return f"wrote more than {size(most.disk_bytes)} to its folder"
        return ""

    def _look(self) -> Family:
        used, ready, descendants, memory, disk = 0.0, False, 0, 0, 0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._pid)
            children = root.children(recursive=True)
            descendants = len(children)
            for process in [root, *children]:
                with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                    times = process.cpu_times()
                    used += times.user + times.system
                    used += times.children_user + times.children_system
                    ready |= process.status() == psutil.STATUS_RUNNING
                    if self._allowance is not None:
                        held = process.memory_info()
                        memory += held.rss - getattr(held, "shared", 0)
            # Pages that a fork has in common with its parent were counted for both. To take them
            # apart is dear, and seldom needed.
            if self._allowance is not None and memory > self._allowance.memory_bytes:
                memory = sum(_own_memory(process) for process in [root, *children])
        if self._allowance is not None:
            disk = _disk(self._folders, self._allowance.disk_bytes)
        return Family(used, ready, descendants, memory, disk)


def _own_memory(process: psutil.Process) -> int:
    """Bytes, of a page that n processes share 1/n; what is not known is counted in full."""
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    except OSError:  # no right to look, or gone
        pass
    with contextlib.suppress(psutil.NoSuchProcess):
        held = process.memory_info()
        return int(held.rss - getattr(held, "shared", 0))
    return 0


def _disk(folders: Sequence[Path], enough: int) -> int:
    """Bytes on disk below `folders`; stops counting beyond `enough`."""
    total = 0
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):  # gone meanwhile
                    total += os.lstat(os.path.join(place, name)).st_blocks * 512
            if total > enough:
                return total
    return total


def end_family(pid: int) -> None:
    """Kill a child of this process and all its descendants, also those that left its process
    group; returns when the descendants are gone. The child itself is left to be reaped."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)  # in one go: nobody forks away meanwhile
        else:
            os.kill(pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    end = time.monotonic() + 5  # a moment, but for one that the kernel will not let go
    kin = {pid, *(member.pid for member in family)}
    while (family := [m for m in family if _lives(m, kin)]) and time.monotonic() < end:
        time.sleep(0.01)


def _lives(process: psutil.Process, kin: Collection[int]) -> bool:
    """Whether it does, or has still to be passed on by a parent of its kin that is about to end."""
    try:
        if process.is_running() and (
            process.status() != psutil.STATUS_ZOMBIE or process.ppid() in kin
        ):
            return True
    except psutil.NoSuchProcess:
        pass
    # Where this process inherits orphans (the first of a container does), nobody else reaps them;
    # and unreaped they keep others alive, for the first of a PID namespace waits for all in it.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    return False


def read_capped(path: Path, most: int) -> bytes:
    """The content of a file that foreign work wrote.

    Raises:
        OSError: it is no plain file (but a link or a pipe, say), or has more than `most` bytes.
    """
    content = _read(path, most + 1, from_end=False)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {size(most)}", path.name)
    return content


def read_tail(path: Path, most: int) -> str:
    """The last `most` bytes of it as text; "" where there is no plain file."""
    try:
        return _read(path, most, from_end=True).decode(errors="replace")
    except OSError:
        return ""


def _read(path: Path, most: int, from_end: bool) -> bytes:
    # A link could lead anywhere, and to open a pipe would be to wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a plain file", path.name)
        if from_end:
            file.seek(max(0, status.st_size - most))
        return file.read(most)
