"""Real compiles and real proofs, through a server and two workers of which each is killed once.

The stand-ins of `test_soak` allow for many deaths; here each death hits real work: a worker in
the middle of a compiler's run, another in the middle of a proof, the server while both work.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from esper.errors import EsperError
from esper.karn.templates import templates_for
from esper.kasmina.artifact import open_artifact
from esper.leyline.artifact import Pipeline
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.rpc.client import RemoteLibrary
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, blueprint

SOUND = 3
# Leases end soon, so that the test need not wait a minute or two for those of the dead.
FORGE = """
import sys, threading
from pathlib import Path
from esper.leyline.artifact import Pipeline
from esper.rpc.client import RemoteLibrary
from esper.tezzeret import service

service.LEASE_SECONDS = 10.0
library = RemoteLibrary(sys.argv[1], cache=Path(sys.argv[2]))
service.run(library, threading.Event(), worker_name="forge", pipeline=Pipeline.FAST)
"""
BENCH = """
import sys, threading
from pathlib import Path
from esper.rpc.client import RemoteLibrary
from esper.urabrask.plan import Plan
from esper.urabrask.service import Limits, run

library = RemoteLibrary(sys.argv[1], cache=Path(sys.argv[2]))
run(library, threading.Event(), worker_name="bench", lease_seconds=10.0,
    limits=Limits(plan=Plan(seconds=0.5, calls=20)))
"""


class Processes:
    """The server and the workers, started again whenever they are gone."""

    def __init__(self, folder: Path) -> None:
        self.library, self.address = folder / "library", f"unix:{folder}/s"
        self._folder = folder
        self._commands = {
            "server": ["-m", "esper.cli.main", "serve", "--library", str(self.library),
                       "--listen", self.address],
            "forge": ["-c", FORGE, self.address, str(folder / "cache-forge")],
            "bench": ["-c", BENCH, self.address, str(folder / "cache-bench")],
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def tend(self) -> None:
        for name, command in self._commands.items():
            running = self._running.get(name)
            if running is None or running.poll() is not None:
                temporary = self._folder / f"tmp-{name}"
                temporary.mkdir(exist_ok=True)
                with (self._folder / f"{name}.log").open("ab") as log:
                    self._running[name] = subprocess.Popen(
                        [sys.executable, *command], stdout=log, stderr=log,
                        env={**os.environ, "TMPDIR": str(temporary)})

    def family(self, name: str) -> list[psutil.Process]:
        try:
            own = psutil.Process(self._running[name].pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, name: str) -> None:
        """And see that what it had started is gone with it."""
        family = self.family(name)
        self._running[name].kill()
        self._running[name].wait()
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, [p.cmdline() for p in left]

    def end(self) -> None:
        for name in self._running:
            self.kill(name)

    def compiling(self) -> bool:
        """A compiler works on a blueprint; what the forge compiles to get warm is elsewhere."""
        for process in self.family("forge"):
            try:
                if process.name() == "cc1plus" and "/item-" in " ".join(process.cmdline()):
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    def proving(self) -> bool:
        """A child of Urabrask's has opened a kernel, and the proof is what it does first."""
        for process in self.family("bench"):
            try:
                if "/forward.so" in Path(f"/proc/{process.pid}/maps").read_text():
                    return True
            except OSError:
                continue
        return False

    def logs(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in self._folder.glob("*.log"))


@pytest.mark.slow
def test_real_work_survives_the_death_of_whoever_does_it(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    dishonest = blueprint(1)  # at birth its output is not its input
    wanted = [*templates_for(SIG)[:SOUND], dishonest]
    assert len({ir.id for ir in wanted}) == SOUND + 1
    to_submit = list(wanted)
    to_die = ["forge", "bench", "server"]
    client = RemoteLibrary(processes.address, cache=tmp_path / "cache")
    library = LocalLibrary(processes.library)

    def at_work(name: str) -> bool:
        return {"forge": processes.compiling, "bench": processes.proving}.get(
            name, lambda: processes.compiling() or processes.proving())()

    def done() -> bool:
        blueprints, kernels = library.blueprints(), library.kernels()
        return len(blueprints) == len(wanted) and all(
            b.status in (BlueprintStatus.COMPILED, BlueprintStatus.INVALID) for b in blueprints
        ) and all(k.status in (KernelStatus.VALIDATED, KernelStatus.REJECTED) for k in kernels)

    end = time.monotonic() + 900
    try:
        while to_die or to_submit or not done():
            assert time.monotonic() < end, (to_die, library.blueprints(), processes.logs())
            processes.tend()
            if to_submit:
                try:
                    client.submit(to_submit[0], SIG, author="karn", pipeline=Pipeline.FAST)
                    del to_submit[0]
                except EsperError:
                    continue  # the server is not there yet: the same one again
            for name in [n for n in to_die if n != "server" or len(to_die) == 1]:
                if at_work(name):
                    processes.kill(name)
                    to_die.remove(name)
            time.sleep(0.05)
    finally:
        processes.end()
        client.close()

    blueprints, kernels = library.blueprints(), library.kernels()
    assert {b.blueprint_id for b in blueprints} == {ir.id for ir in wanted}
    (refused,) = [b for b in blueprints if b.status is BlueprintStatus.INVALID]
    assert refused.blueprint_id == dishonest.id and "birth" in refused.reason, refused.reason
    assert sorted(k.blueprint_id for k in kernels) == sorted(ir.id for ir in wanted[:-1])
    reasons = {h.reason for ir in wanted for h in library.history(ir.id)}
    reasons |= {h.reason for k in kernels for h in library.history(k.kernel_id)}
    assert {"the lease of forge expired", "the lease of bench expired"} <= reasons
    for kernel in kernels:
        path = library.fetch(kernel.digest)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == kernel.digest
        assert kernel.report is not None and kernel.report.proof, "proved, not given up on"
        assert kernel.status is KernelStatus.VALIDATED or kernel.reason
        if kernel.status is KernelStatus.VALIDATED:
            assert kernel.report.accepted
            assert open_artifact(path, kernel.digest).manifest == kernel.manifest
    assert any(k.status is KernelStatus.VALIDATED for k in kernels)
    # A crash between blob and record leaves a blob that nothing names, but a whole one.
    for digest in library.orphans():
        assert hashlib.sha256(library.fetch(digest).read_bytes()).hexdigest() == digest
    assert library.leases() == [] and library._blobs.writing() == 0
