"""What an idle compile service picks up, in which order, and never twice."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from esper.karn import service as karn
from esper.leyline.artifact import Pipeline, Toolchain, kernel_id
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.library import KernelRecord
from esper.leyline.signature import SiteSignature
from esper.tezzeret import service
from esper.tezzeret.idle import candidates, claim_idle_work
from esper.tezzeret.toolchain import toolchain
from esper.urza.library import LocalLibrary
from tests.karn.test_karn import field_report
from tests.urza.support import SIG, TOOLCHAIN, artifact, blueprint, report

NEW = Toolchain(torch="99.0", isa=TOOLCHAIN.isa, compiler=TOOLCHAIN.compiler, esper="9")


def compiled(library: LocalLibrary, n: int, interest: float = 0.5) -> str:
    ir = blueprint(n)
    library.submit(ir, SIG, author="karn", interest=interest)
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact(ir))
    return ir.id


def test_three_tiers_in_order_and_each_once(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    failed = compiled(library, 2)
    work = library.claim_kernel("urabrask", 60)
    assert work is not None
    library.complete_kernel(work, report(work.record.kernel_id, accepted=False))
    plain, wanted = compiled(library, 1), compiled(library, 3, interest=0.75)

    def offered(tools: Toolchain) -> list[tuple[Pipeline, str]]:
        found = candidates(library, lambda record: tools, time.time())
        return [(pipeline, record.blueprint_id) for record, pipeline, _ in found]

    aggressive, standard = (Pipeline.AGGRESSIVE, wanted), (Pipeline.STANDARD, failed)
    assert offered(TOOLCHAIN) == [aggressive, standard]
    renewed = offered(NEW)
    assert renewed[:2] == [aggressive, standard]
    assert set(renewed[2:]) == {(Pipeline.FAST, b) for b in (plain, failed, wanted)}

    tried: set[str] = set()
    for pipeline, blueprint_id in (aggressive, standard):
        claim = claim_idle_work(library, "w", 60, lambda record: TOOLCHAIN, tried)
        assert claim is not None
        assert (claim.record.pipeline, claim.record.blueprint_id) == (pipeline, blueprint_id)
        library.reject_blueprint(claim, "it does not compile")
    again = claim_idle_work(library, "w", 60, lambda record: TOOLCHAIN, tried)
    assert again is None, "not again in this life"
    assert tried == {kernel_id(b, SIG, TOOLCHAIN, p) for p, b in (aggressive, standard)}
    nowhere = candidates(library, lambda record: None, time.time())
    assert list(nowhere) == [], "what cannot be compiled here is left to others"


def test_an_idle_service_does_not_read_the_whole_library_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, stop, looks = LocalLibrary(tmp_path), threading.Event(), list[float]()

    def look(*_: object) -> None:
        looks.append(time.monotonic())
        if len(looks) == 4:
            stop.set()

    monkeypatch.setattr(service, "claim_idle_work", look)
    monkeypatch.setattr(service, "Forge", StandIn)
    monkeypatch.setattr(service, "IDLE_SECONDS", 0.3)
    service.run(library, stop, poll_seconds=0.01)
    assert all(b - a >= 0.3 for a, b in itertools.pairwise(looks))


class StandIn:
    """A forge whose kernels are noise under an honest manifest; notes what it was asked for."""

    asked: ClassVar[list[tuple[str, Pipeline]]] = []

    def compile(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, **_: object
    ) -> bytes:
        self.asked.append((ir.id, pipeline))
        return artifact(ir, signature, pipeline, toolchain())

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *exc: object) -> None: ...


def test_a_long_run_gives_what_has_shown_its_worth_the_best_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Karn and Tezzeret as they serve, and a trainer that tries one kernel, which gains."""
    library, stop, asked = LocalLibrary(tmp_path), threading.Event(), []
    library.register_signature(SIG)
    monkeypatch.setattr(StandIn, "asked", asked)
    monkeypatch.setattr(service, "Forge", StandIn)
    monkeypatch.setattr(service, "IDLE_SECONDS", 0.2)
    services = [
        threading.Thread(target=run, args=(library, stop), kwargs={"poll_seconds": 0.02})
        for run in (karn.run, service.run)
    ]
    for thread in services:
        thread.start()
    tried: KernelRecord | None = None
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (work := library.claim_kernel("urabrask", 60)) is not None:
            done = library.complete_kernel(work, report(work.record.kernel_id))
            if tried is None:
                tried = done
                library.add_report(field_report(tried, gain=0.1))
        if tried is not None and (tried.blueprint_id, Pipeline.AGGRESSIVE) in asked:
            break
        time.sleep(0.005)
    stop.set()
    for thread in services:
        thread.join(30)
    assert tried is not None
    assert [p for b, p in asked if b == tried.blueprint_id] == [
        Pipeline.STANDARD, Pipeline.AGGRESSIVE]
