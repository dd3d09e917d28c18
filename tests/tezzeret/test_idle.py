"""What an idle compile service picks up, in which order, and never twice."""

from __future__ import annotations

import time
from pathlib import Path

from esper.leyline.artifact import Pipeline, Toolchain, kernel_id
from esper.tezzeret.idle import candidates, claim_idle_work
from esper.urza.library import LocalLibrary
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
