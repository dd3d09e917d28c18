"""Shutting a process in, one layer on top of the other.

The layers are Linux's own (namespaces(7), seccomp(2)). Not every machine allows them all:
`probe` finds out which it does, and `enter` puts on exactly those. What runs inside cannot take
them off again. None of them is a virtual machine: inside and outside share one kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path

import psutil

from esper.sandbox.allowance import Allowance, limit


class Layer(StrEnum):
    """In the order in which they are put on."""

    PRIVILEGES = "no privileges"  # a user namespace, and every capability in it dropped
    NETWORK = "no network"  # a network namespace without a device that is up
    IPC = "own System V IPC"  # an IPC namespace: no segment or queue of others', none left
    FILES = "read-only files"  # a mount namespace: written to are only the folders given
    PROCESSES = "own processes"  # a PID namespace: others are not seen, none outlives it
    SOCKETS = "no sockets"  # a system call filter; a Unix socket is a file to namespaces


NEEDS = {Layer.PROCESSES: Layer.FILES}  # a /proc of its own is a mount

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _SLAVE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 19
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_PDEATHSIG, _SET_SECCOMP, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 22, 36, 38
_FILTER = 2  # SECCOMP_MODE_FILTER
_CAPABILITY_VERSION = 0x20080522
# Linux hands the lowest numbers out once, while a PID namespace is young, and so cannot count
# fewer tasks than these. Threads are tasks too.
_RESERVED_PIDS = 300
_SHARED_MEMORY = b"size=256m,mode=1777"


def enter(layers: Collection[Layer], allowance: Allowance, writable: Sequence[Path]) -> None:
    """Shut this process in; of all files it can then write to those in `writable` only.

    Returns in a child. The process itself stays outside as its keeper: it waits, ends whatever
    the child has left running, and then ends as the child did, by the same status or signal.
    Both die with their parents. It must have one thread only.

    Raises:
        OSError: a layer could not be put on.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the keeper may have to die by a signal
    if sys.platform != "linux":
        limit(allowance)
        return
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    if Layer.PRIVILEGES in layers:
        _enter_user_namespace()
    if Layer.NETWORK in layers:
        _call("unshare", _NEWNET)
    if Layer.IPC in layers:
        _call("unshare", _NEWIPC)
    if Layer.FILES in layers:
        _freeze_files(writable)
    _leave_a_keeper(Layer.PROCESSES in layers, allowance.processes)
    if Layer.SOCKETS in layers:
        _refuse_sockets()
    limit(allowance)
    if Layer.PRIVILEGES in layers:
        _limit_processes(allowance.processes)
        _call("capset", struct.pack("Ii", _CAPABILITY_VERSION, 0), bytes(24))


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library. Raises OSError where it fails."""
    # Variadic ones read whole registers, so that no argument may be half of one.
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = getattr(ctypes.CDLL(None, use_errno=True), name)(*given)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _kernel() -> tuple[int, ...]:
    return tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2] if n.isdigit())


def _enter_user_namespace() -> None:
    """Be the same user to all files, and nobody to everything else outside."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
    _call("mount", source, os.fsencode(target), kind, flags, data)


def _set_read_only(target: str, on: bool, flags: int = 0) -> None:
    attributes = struct.pack("4Q", _ATTR_RDONLY * on, _ATTR_RDONLY * (not on), 0, 0)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, attributes,
          len(attributes))


def _freeze_files(writable: Sequence[Path]) -> None:
    _call("unshare", _NEWNS)
    _mount(b"none", "/", None, _REC | _SLAVE, None)
    for folder in writable:
        _mount(os.fsencode(folder), str(folder), None, _BIND, None)
    _set_read_only("/", True, _AT_RECURSIVE)
    for folder in writable:
        _set_read_only(str(folder), False)
    if os.path.isdir("/dev/shm"):
        _mount(b"tmpfs", "/dev/shm", b"tmpfs", _NOSUID | _NODEV, _SHARED_MEMORY)


def _leave_a_keeper(apart: bool, processes: int) -> None:
    """Fork; returns in the child. `apart`: in a PID namespace of its own."""
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # new credentials may have cleared it
    lifeline = os.pipe()
    init = None
    if apart:
        init = _start_init(lifeline, processes)
    else:
        # What loses its parent becomes the keeper's child, and so is found.
        _call("prctl", _CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        _die_with_the_keeper(lifeline)
        return
    pid, status = os.wait()
    while pid != child:
        pid, status = os.wait()
    if init is not None:
        os.kill(init, signal.SIGKILL)  # and the kernel kills all that are left in there
        os.waitpid(init, 0)  # or it would be left to whoever inherits it, who may not look
    else:
        while left := psutil.Process().children(recursive=True):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _die_with_the_keeper(lifeline: tuple[int, int]) -> None:
    """Have this child of it killed when the keeper ends; in a PID namespace it has no number
    that could be asked for, so the pipe says whether that has happened already."""
    ours, its = lifeline
    os.close(its)
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([ours], [], [], 0)[0]:  # the end of a pipe that nobody holds open
        os._exit(1)
    os.close(ours)


def _start_init(lifeline: tuple[int, int], processes: int) -> int:
    """Open a PID namespace: start its first process, which reaps orphans and does nothing else."""
    _call("unshare", _NEWPID)
    ours, its = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            _die_with_the_keeper(lifeline)
            _mount(b"proc", "/proc", b"proc", _NOSUID | _NODEV | _NOEXEC, None)
            if _kernel() >= (6, 14):  # before, this file spoke for the whole machine
                with contextlib.suppress(OSError):
                    Path("/proc/sys/kernel/pid_max").write_text(str(_RESERVED_PIDS + processes))
            _set_read_only("/proc", True)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            os.write(its, b"ready")
            os.close(its)
            while True:
                signal.pause()
        except OSError as e:
            os.write(its, str(e).encode())
        finally:
            os._exit(1)
    os.close(its)
    with os.fdopen(ours, "rb") as said:
        heard = said.read()
    if heard != b"ready":
        os.waitpid(pid, 0)
        raise OSError(heard.decode(errors="replace") or "its first process died")
    return pid


def _limit_processes(most: int) -> None:
    """Where this can: root is exempt, and before 5.14 Linux counted all that a user runs."""
    if os.getuid() != 0 and _kernel() >= (5, 14):
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        cap = _RESERVED_PIDS + most
        cap = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (cap, cap))


# Machine: its number in linux/audit.h, socket(2), and the first number of other conventions.
_CALLS = {"x86_64": (0xC000003E, 41, 0x40000000), "aarch64": (0xC00000B7, 198, 1 << 31)}
_IO_URING_SETUP = 425  # its rings open sockets without socket(2)
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # with EPERM


def _refuse_sockets() -> None:
    """A filter of system calls under which no socket can be made, of whatever family.

    `socketpair` still works: its ends lead nowhere. Programs for another instruction set get no
    system call at all.
    """
    if platform.machine() not in _CALLS:
        raise OSError(f"its system calls are not known on {platform.machine()}")
    machine, socket, foreign = _CALLS[platform.machine()]
    program = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 0, 5, machine),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, 3, 0, foreign),
        (_EQUAL, 2, 0, socket),
        (_EQUAL, 1, 0, _IO_URING_SETUP),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("prctl", _SET_SECCOMP, _FILTER, head, 0, 0)
