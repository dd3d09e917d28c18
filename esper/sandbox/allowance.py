"""What foreign work may take, held by rlimits, and what an excess of it looks like from inside."""

from __future__ import annotations

import errno
import re
import resource
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Allowance:
    """What a process and its descendants may take; generous, it is there for what has gone wild.

    Per process, held by the kernel: `memory_bytes` of data, `cpu_seconds`, and `file_bytes` in
    any one file. Of all of them together, watched by their owner (`watch.Watch`): `memory_bytes`,
    `processes` at once, and `disk_bytes` in the folders they may write to.
    """

    memory_bytes: int
    cpu_seconds: int = 900
    file_bytes: int = 1 << 30
    disk_bytes: int = 4 << 30
    processes: int = 64


def size(count: float) -> str:
    """A number of bytes for people: "12 GiB", "1.5 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def limit(allowance: Allowance) -> None:
    """Set the rlimits of this process, for good, and with them those of its descendants."""
    for what, most in (
        (resource.RLIMIT_DATA, allowance.memory_bytes),
        (resource.RLIMIT_FSIZE, allowance.file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _set(what, most, most)
    # A signal that says why, and five seconds later one that cannot be ignored.
    _set(resource.RLIMIT_CPU, allowance.cpu_seconds, allowance.cpu_seconds + 5)


def in_force() -> Allowance:
    """What `limit` has set in this process, as far as rlimits tell."""
    memory, cpu, file = (resource.getrlimit(what)[0] for what in (
        resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE))
    return Allowance(memory_bytes=memory, cpu_seconds=cpu, file_bytes=file)


def _set(what: int, soft: int, hard: int) -> None:
    _, highest = resource.getrlimit(what)
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(what, (soft, hard))


def explain(error: BaseException, allowance: Allowance) -> str:
    """What an error says of the limits or of a program's death, in plain words.

    "" where it says nothing of the kind. Looks at the whole chain of causes.
    """
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            break
        if words := _one(link, allowance):
            return words
        link = link.__cause__ or link.__context__
    return ""


def killed(number: int, allowance: Allowance) -> str:
    """What a death by signal `number` says: "was killed by SIGSEGV"."""
    if number == signal.SIGKILL:
        return "was killed by SIGKILL, which is often a lack of memory"
    reasons = {signal.SIGXFSZ: errno.EFBIG, signal.SIGXCPU: errno.ETIME}
    if number in reasons:
        return _words(reasons[signal.Signals(number)], allowance)
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:  # a realtime signal has no name
        return f"was killed by signal {number}"


def _words(number: int, allowance: Allowance) -> str:
    return {
        errno.ENOMEM: f"ran out of memory (limit {size(allowance.memory_bytes)})",
        errno.EFBIG: f"wrote a file over {size(allowance.file_bytes)}",
        errno.ETIME: f"used more than {allowance.cpu_seconds} s of processor time",
        errno.EAGAIN: "could start no more processes",
    }.get(number, "")


# What the C library, the shell and compilers print when a call is refused or a child is killed.
_SAID = (
    ("bad_alloc|out of memory|memory exhausted|cannot allocate memory", errno.ENOMEM),
    ("file size limit exceeded|file too large", errno.EFBIG),
    ("cpu time limit exceeded", errno.ETIME),
    ("resource temporarily unavailable", errno.EAGAIN),
)


def _one(error: BaseException, allowance: Allowance) -> str:
    match error:
        case MemoryError():
            return _words(errno.ENOMEM, allowance)
        case OSError(errno=int(number)):
            return _words(number, allowance)
        case subprocess.CalledProcessError():
            command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
            program = f"a program that it ran, {Path(command).name},"
            if error.returncode < 0:
                return f"{program} {killed(-error.returncode, allowance)}"
            said = error.output or ""
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            for pattern, number in _SAID:
                if re.search(pattern, said, re.IGNORECASE):
                    return f"{program} {_words(number, allowance)}"
            return f"{program} ended with status {error.returncode}"
    return ""
