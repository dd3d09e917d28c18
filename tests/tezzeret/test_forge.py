"""Real compiles in a real forge, and what happens when one goes wrong."""

from __future__ import annotations

import os
import platform
import signal
import stat
import threading
from pathlib import Path

import psutil
import pytest

from esper.errors import CompileError
from esper.kasmina.artifact import read_artifact
from esper.leyline.artifact import Pipeline
from esper.leyline.base import sha256
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret import contest, libraries, service, worker
from esper.tezzeret.worker import Forge
from esper.urza.library import LocalLibrary
from tests.support import bottleneck
from tests.tezzeret.test_analysis import blueprint, linear

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=16)


def test_what_the_dead_left_is_swept_and_what_other_machines_work_on_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers on twenty machines may share a home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = worker._private_cache()
    here, there = (cache / f"item-4194305-{node}-x" for node in (platform.node(), "another"))
    here.mkdir()
    there.mkdir()
    made = worker._item_folder()
    assert there.exists() and not here.exists()
    assert made.parent == cache and stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.slow
def test_the_service_compiles_refuses_and_does_not_compile_twice(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    good, bad = bottleneck(SiteKind.FEATURES), blueprint(linear("a", "h"))
    library.submit(good, SIG, author="test", pipeline=Pipeline.FAST)
    library.submit(bad, SIG, author="test")
    service.run(library, threading.Event(), once=True)
    status = {b.blueprint_id: (b.status, b.reason) for b in library.blueprints()}
    assert status[good.id][0] is BlueprintStatus.COMPILED
    assert status[bad.id][0] is BlueprintStatus.INVALID and "node 'a'" in status[bad.id][1]
    (kernel,) = library.kernels()
    assert kernel.status is KernelStatus.PENDING_BENCHMARKING
    path = library.fetch(kernel.digest)
    assert sha256(path.read_bytes()) == kernel.digest
    artifact = read_artifact(path, kernel.digest)
    assert artifact.ir.id == good.id and artifact.manifest.compile_seconds > 0


@pytest.mark.slow
def test_a_deadline_ends_a_compile_and_leaves_nothing_running() -> None:
    me = psutil.Process()
    before = {p.pid for p in me.children(recursive=True)}
    with Forge() as forge:
        with pytest.raises(CompileError, match="did not compile within 1 s"):
            forge.compile(bottleneck(SiteKind.FEATURES), SIG, Pipeline.FAST, deadline_seconds=1)
        assert {p.pid for p in me.children(recursive=True)} == before
        # and the forge is good for another one
        forge.start()
        assert forge.pid is not None
        assert os.getsid(forge.pid) == os.getsid(0), "idle priority counts per session"


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_value_of_that_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with Forge() as forge, pytest.raises(CompileError):
        forge.compile(bottleneck(SiteKind.FEATURES), SIG, Pipeline.FAST)


def test_of_several_builds_the_first_is_kept_unless_another_is_clearly_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ratio(signature: SiteSignature, first: contest.Build, second: contest.Build) -> float:
        if second.name == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"a little faster": 0.98, "faster": 0.8, "fast": 0.9}[second.name]

    monkeypatch.setattr(contest, "ratio", ratio)

    def kept(*names: str) -> str:
        builds = [contest.Build(name, None, tmp_path / name)  # type: ignore[arg-type]
                  for name in ("first", *names)]
        for build in builds:
            build.folder.mkdir(exist_ok=True)
        return libraries._fastest(SIG, builds).name

    assert kept() == kept("a little faster", "crashes") == "first"
    assert kept("fast", "faster", "crashes") == "faster"
