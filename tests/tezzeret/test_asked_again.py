"""The same kernel asked for again, however it is asked, compiles nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import Op
from esper.leyline.library import BlueprintClaim
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteKind
from esper.tezzeret import service
from esper.tezzeret.toolchain import toolchain
from esper.urza.library import LocalLibrary
from tests.cli.test_service_commands import end, line, process
from tests.rpc.support import wait_until
from tests.support import bottleneck
from tests.tezzeret.test_idle import StandIn
from tests.urza.support import SIG, artifact

GOOD, WAITING = bottleneck(SiteKind.FEATURES), bottleneck(SiteKind.FEATURES, Op.TANH)


@pytest.mark.parametrize("pipeline", list(Pipeline))
def test_two_that_take_it_up_compile_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    asked: list[tuple[str, Pipeline]] = []
    monkeypatch.setattr(StandIn, "asked", asked)
    library = LocalLibrary(tmp_path)
    library.submit(GOOD, SIG, author="test", pipeline=pipeline)

    def carried(claim: BlueprintClaim | None) -> str:
        assert claim is not None
        return service.carry(library, claim, StandIn(), threading.Event(), None, 0.0)

    carried(library.claim_blueprint("first", 60))
    outcome = carried(library.claim_recompilation(GOOD.id, SIG, "second", 60, pipeline))
    assert "is in the library already" in outcome
    assert asked == [(GOOD.id, pipeline)] and len(library.kernels()) == 1
    assert [b.status for b in library.blueprints()] == [BlueprintStatus.COMPILED]


@pytest.mark.slow
def test_a_worker_makes_an_aggressive_kernel_once(tmp_path: Path) -> None:
    """Chosen by interest and compiled for real; the next worker, idle, takes up what still lacks
    such a kernel and leaves this one alone."""
    library = LocalLibrary(tmp_path / "library")
    library.submit(GOOD, SIG, author="test", interest=0.9)

    def at_work(address: str, until: Callable[[], object], name: str) -> None:
        log = tmp_path / name
        with process("worker", "tezzeret", "--urza", address, log=log) as worker:
            assert "at work" in line(worker)
            assert wait_until(until, 500), log.read_text()
            assert end(worker) == 0, log.read_text()

    with process("serve", "--library", str(library.root), log=tmp_path / "serve") as serving:
        address = line(serving).split()[-1]
        at_work(address, library.kernels, "first")
        (kernel,) = library.kernels()
        assert kernel.manifest.pipeline is Pipeline.AGGRESSIVE
        assert "times the time of plain" in (tmp_path / "first").read_text(), "it was measured"
        assert library.submit(GOOD, SIG, author="again", interest=1.0).status == "COMPILED"
        library.submit(WAITING, SIG, author="test", interest=0.8)
        claim = library.claim_blueprint("test", 60)
        assert claim is not None
        library.complete_blueprint(claim, artifact(WAITING, tools=toolchain()))
        at_work(address, library.leases, "second")
        assert end(serving) == 0
    claims = {ir.id: [c.reason.split("@")[0] for c in library.history(ir.id)
                      if c.after == BlueprintStatus.COMPILING] for ir in (GOOD, WAITING)}
    assert claims == {GOOD.id: ["claimed by tezzeret"],
                      WAITING.id: ["claimed by test", "claimed by tezzeret"]}
    assert kernel in library.kernels()
