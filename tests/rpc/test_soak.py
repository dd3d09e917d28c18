"""Two hundred blueprints through a server and two workers that are killed all the time.

The server dies by SIGKILL at each step of storing a kernel, the workers at random moments and
at theirs. Compiling and proving are stood in for by a sleep, so that many deaths fit
into a minute; the library, its leases and the wire are the real ones.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.errors import EsperError
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.rpc.client import RemoteLibrary
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, blueprint

BLUEPRINTS = 200
SERVER_STEPS = ("write", "fsync", "rename", "record", "acknowledge")
WORKER_STEPS = ("claim", "compile", "fetch", "prove")

# Dies by its own hand the third time that it comes to the step it was given.
SERVER = """
import itertools, os, signal, stat, sys, threading
from esper.rpc import library_service
from esper.rpc.address import parse_address
from esper.rpc.server import Server
from esper.urza import blobs, queues
from esper.urza.library import LocalLibrary

folder, address, step = sys.argv[1:]
counted = itertools.count(1)

def dying(owner, name, after, counts=lambda *_: True):
    real = getattr(owner, name)
    def call(*given, **named):
        turn = next(counted) if counts(*given) else 0
        if turn == 3 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*given, **named)
        if turn == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

def of_a_blob(fd):  # not of the folder that it lies in
    return stat.S_ISREG(os.fstat(fd).st_mode)

def of_a_kernel(con, line, *_):  # not of a blueprint that is submitted
    return line is queues.KERNELS

where = {"write": (os, "fsync", False, of_a_blob), "fsync": (os, "fsync", True, of_a_blob),
         "rename": (os, "replace", True), "record": (queues, "born", True, of_a_kernel),
         "acknowledge": (LocalLibrary, "complete_blueprint", True)}
if step in where:
    dying(*where[step])
with Server(LocalLibrary(folder), parse_address(address)):
    print("up", flush=True)
    sys.stdin.read()
"""

WORKER = """
import os, random, signal, sys, time
from pathlib import Path
from esper.errors import EsperError
from esper.rpc.client import RemoteLibrary
from tests.urza.support import artifact, report

address, cache, name, step = sys.argv[1:]
library = RemoteLibrary(address, cache=Path(cache))
left = random.randint(5, 30)

def here(now):
    global left
    left -= now == step
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

while True:
    try:
        claim = library.claim_blueprint(name, 1.0)
        if claim is not None:
            here("claim")
            time.sleep(0.002)
            here("compile")
            if int(claim.record.blueprint_id[-1], 16) == 0:
                library.reject_blueprint(claim, "too deep")
            else:
                library.complete_blueprint(claim, artifact(claim.record.ir))
        work = library.claim_kernel(name, 1.0)
        if work is not None:
            library.fetch(work.record.digest)
            here("fetch")
            sound = int(work.record.kernel_id[-1], 16) != 0
            here("prove")
            library.complete_kernel(work, report(work.record.kernel_id, accepted=sound))
        if claim is None and work is None:
            time.sleep(0.05)
    except EsperError:
        time.sleep(0.01)
"""


@contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", script, *arguments],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_half_done(tmp_path: Path) -> None:
    folder, address = tmp_path / "library", f"unix:{tmp_path}/s"
    draw = random.Random(0)
    deaths = {"server": 0, "worker": 0}
    submitted = 0
    client = RemoteLibrary(address, cache=tmp_path / "cache-0")
    worker_steps = itertools.cycle([*WORKER_STEPS, "random"])
    workers: list[subprocess.Popen[bytes]] = []

    def tend_workers() -> None:
        for worker in [w for w in workers if w.poll() is not None]:
            workers.remove(worker)
            worker.communicate()
            deaths["worker"] += 1
        while len(workers) < 2:
            name = f"w-{len(workers)}"
            workers.append(subprocess.Popen(
                [sys.executable, "-c", WORKER, address, str(tmp_path / name), name,
                 next(worker_steps)], stdin=subprocess.PIPE))

    def done() -> bool:
        library = LocalLibrary(folder)
        library.sweep()
        blueprints, kernels = library.blueprints(), library.kernels()
        library.close()
        return len(blueprints) == BLUEPRINTS and all(
            b.status in (BlueprintStatus.COMPILED, BlueprintStatus.INVALID) for b in blueprints
        ) and all(k.status in (KernelStatus.VALIDATED, KernelStatus.REJECTED) for k in kernels)

    end = time.monotonic() + 400
    finished = False
    try:
        for step in itertools.cycle([*SERVER_STEPS, "random"]):
            with running(SERVER, str(folder), address, step) as server:
                assert server.stdout is not None and server.stdout.readline() == b"up\n"
                life = time.monotonic() + (2.0 if step == "random" else 20.0)
                while server.poll() is None and time.monotonic() < life and not finished:
                    assert time.monotonic() < end, (submitted, deaths)
                    tend_workers()
                    if submitted < BLUEPRINTS:
                        try:
                            client.submit(blueprint(submitted + 1), SIG, author="karn")
                            submitted += 1
                        except EsperError:  # full, or the server is gone: the same one again
                            time.sleep(0.02)
                    else:
                        time.sleep(0.05)
                        finished = deaths["server"] >= len(SERVER_STEPS) and done()
                    if draw.random() < 0.02:
                        draw.choice(workers).kill()
            deaths["server"] += 1
            if finished or (submitted == BLUEPRINTS and done()):
                break
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
        client.close()
    print(f"\n{deaths}")
    assert deaths["server"] > len(SERVER_STEPS) and deaths["worker"] > len(WORKER_STEPS)

    library = LocalLibrary(folder)
    blueprints, kernels = library.blueprints(), library.kernels()
    assert {b.ir.id for b in blueprints} == {blueprint(n).id for n in range(1, BLUEPRINTS + 1)}
    compiled = [b for b in blueprints if b.status is BlueprintStatus.COMPILED]
    assert sorted(k.blueprint_id for k in kernels) == sorted(b.blueprint_id for b in compiled)
    for kernel in kernels:
        content = library.fetch(kernel.digest).read_bytes()
        assert hashlib.sha256(content).hexdigest() == kernel.digest
        assert len(content) == kernel.size
        assert kernel.report is not None or "leases on it expired" in kernel.reason
    # A crash between blob and record leaves a blob that nothing names, but a whole one.
    for digest in library.orphans():
        assert hashlib.sha256(library.fetch(digest).read_bytes()).hexdigest() == digest
    assert library.leases() == []
    assert library._blobs.writing() == 0, "half-written files were swept"
