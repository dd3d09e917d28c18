"""The forge's children: forked, waited for together, and what they died of."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from esper.sandbox.allowance import Allowance, explain, killed
from esper.sandbox.watch import end_family, read_tail

_MOST_WORDS = 16 << 10  # bytes of an error; a compiler's last words matter most
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends; at once if it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)


class NothingBuilt(RuntimeError):
    """Says all there is to say: what its children died of."""


def in_children(
    works: Mapping[str, Callable[[], None]], folder: Path, allowance: Allowance
) -> str:
    """Run each in a child of its own, all at the same time; the error or "".

    The first that fails ends the others. An error begins with what happened in plain words.
    """
    running = {_start(work, folder / f"{name}.log", allowance): name
               for name, work in works.items()}
    while running:
        pid, status = _wait_for_one(running)
        log = folder / f"{running.pop(pid)}.log"
        if code := os.waitstatus_to_exitcode(status):
            for other in running:
                end_family(other)
            for other in running:
                os.waitpid(other, 0)
            end = killed(-code, allowance) if code < 0 else f"ended with status {code}"
            return read_tail(log, _MOST_WORDS) or end
    return ""


def _wait_for_one(pids: Iterable[int]) -> tuple[int, int]:
    """(pid, status) of the first to end; other children of this process are not reaped."""
    while True:
        for pid in pids:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return pid, status
        time.sleep(0.02)


def _start(work: Callable[[], None], log: Path, allowance: Allowance) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_with_parent(parent)
            work()
            code = 0
        except NothingBuilt as e:
            log.write_text(str(e), errors="backslashreplace")
        except BaseException as e:
            words = explain(e, allowance) or type(e).__name__
            # What is cut away is its middle: `read_tail` must not lose the plain words.
            log.write_text(f"{words}\n{traceback.format_exc()[-_MOST_WORDS // 2:]}",
                           errors="backslashreplace")
        finally:
            os._exit(code)
    return pid
