"""A compiler that goes wild over one blueprint is the end of that blueprint and of nothing else.

Through the real service, library, forge and sandbox. The compiler is a script in `CXX`: it looks
for a number of channels in what it is to compile, and for some of them does what no compiler
should. For all others, the control's among them, it is g++.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.sandbox.allowance import Allowance
from esper.sandbox.layers import Layer
from esper.sandbox.probe import available
from esper.tezzeret import service
from esper.tezzeret.control import control_error
from esper.tezzeret.toolchain import toolchain
from esper.tezzeret.worker import Forge
from esper.urza.library import LocalLibrary
from tests.support import bottleneck

MOST = Allowance(memory_bytes=8 << 30, file_bytes=256 << 20, processes=40)
HANG_SECONDS = 20.0  # of its own time; what leads up to the compiler takes a few
PROGRAM = "a program that it ran, misbehave.sh, "
WILD = {  # channels of the site: what the compiler does there, and what must be said of it
    31: ("crash", PROGRAM + "was killed by SIGABRT"),
    37: ("hang", f"did not compile within {HANG_SECONDS:g} s"),
    41: ("fork", "started more than 40 processes"),
    43: ("eat", PROGRAM + "ran out of memory (limit 8 GiB)"),
    47: ("write", PROGRAM + "wrote a file over 256 MiB"),
    53: ("connect", PROGRAM + "ended with status 1"),
}
GOOD = 16


class Impatient(Forge):
    """The real forge; one item's deadline is short, for the test's sake."""

    def compile(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline,
        deadline_seconds: float | None = None, cancelled: Callable[[], bool] = lambda: False,
    ) -> bytes:
        hangs = WILD.get(signature.channels, ("",))[0] == "hang"
        return super().compile(ir, signature, pipeline,
                               HANG_SECONDS if hangs else deadline_seconds, cancelled)


def compiler(folder: Path, port: int, path: Path) -> Path:
    """The script, and the program that misbehaves; returns the script."""
    program = folder / "misbehave"
    source = Path(__file__).with_name("misbehave.c")
    subprocess.run([os.environ.get("CC", "cc"), "-O0", source, "-o", program], check=True)
    script = folder / "misbehave.sh"
    cases = "".join(
        f'grep -qwE "{channels}L?" $sources && exec {program} {how} {port} {path}\n'
        for channels, (how, _) in WILD.items()
    )
    script.write_text(
        '#!/bin/sh\nsources=\nfor word in "$@"; do\n'
        '  case "$word" in *.cpp) sources="$sources $word";; esac\ndone\n'
        f'if [ -n "$sources" ] && [ "$1" != -E ]; then :\n{cases}fi\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.slow
def test_each_is_a_failure_of_its_blueprint_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    library, path = LocalLibrary(tmp_path / "library"), tmp_path / "socket"
    ir = bottleneck(SiteKind.FEATURES)
    for channels in (*WILD, GOOD):
        site = SiteSignature(kind=SiteKind.FEATURES, channels=channels)
        library.submit(ir, site, author="test", pipeline=Pipeline.FAST)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        monkeypatch.setenv("CXX", str(compiler(tmp_path, tcp.getsockname()[1], path)))
        monkeypatch.setattr(service, "Forge", lambda: Impatient(MOST))
        # The control is real, and asked once: for six verdicts it would be compiled six times.
        answers: dict[str, str] = {}

        def once(forge: Forge, device: str, cancelled: Callable[[], bool]) -> str:
            if device not in answers:
                answers[device] = control_error(forge, device, cancelled)
            return answers[device]

        monkeypatch.setattr(service, "control_error", once)
        toolchain.cache_clear()
        try:
            service.run(library, threading.Event(), once=True)
        finally:
            toolchain.cache_clear()
        reached = [not _refused(listener) for listener in (tcp, unix)]
    found = {b.signature.channels: b for b in library.blueprints()}
    reasons = {n: b.reason for n, b in found.items() if b.status is BlueprintStatus.INVALID}
    assert sorted(reasons) == sorted(WILD)
    for channels, (_, says) in WILD.items():
        assert says in reasons[channels].splitlines()[0], reasons[channels]
    assert found[GOOD].status is BlueprintStatus.COMPILED
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before
    off = available()
    assert reached == [bool(off[Layer.SOCKETS] and off[Layer.NETWORK]), bool(off[Layer.SOCKETS])]
    assert ("the socket: Operation not permitted" in reasons[53]) == (not off[Layer.SOCKETS])


def _refused(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        return True
    return False
