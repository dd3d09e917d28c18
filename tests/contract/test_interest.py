"""Interest follows evidence, in every library alike."""

from __future__ import annotations

import pytest

from esper.leyline.command import FieldReport
from esper.leyline.library import Library
from esper.leyline.lifecycle import SeedState
from tests.contract.test_library import compiled
from tests.urza.support import OTHER, SIG, blueprint


def test_interest_follows_what_comes_back_from_the_field(library: Library) -> None:
    library.submit(blueprint(), OTHER, author="karn", interest=0.6)
    assert library.claim_blueprint("w", 600) is not None
    kernel = compiled(library, interest=0.6)

    def after(outcome: SeedState, gain: float | None, name: str, kernel_id: str) -> float:
        library.add_report(FieldReport(
            report_id=name, run_id="r", trace_id="t", site="s", kernel_id=kernel_id,
            blueprint_id=kernel.blueprint_id, outcome=outcome, reason="test", gain=gain, epochs=3,
        ))
        (record,) = library.blueprints(SIG)
        return record.interest

    gained = (SeedState.FOSSILIZED, 0.1)
    for outcome, gain, name, kernel_id, expected in (
        (*gained, "first", kernel.kernel_id, 0.8),
        (*gained, "first", kernel.kernel_id, 0.8),  # told twice
        (*gained, "strange", "k-none", 0.8),
        (SeedState.FOSSILIZED, None, "unmeasured", kernel.kernel_id, 0.8),
        (SeedState.FOSSILIZED, float("nan"), "no number", kernel.kernel_id, 0.8),
        (SeedState.ROLLED_BACK, 0.1, "rolled back", kernel.kernel_id, 0.8),
        (*gained, "second", kernel.kernel_id, 0.9),
        (SeedState.CULLED, None, "culled", kernel.kernel_id, 0.675),
    ):
        assert after(outcome, gain, name, kernel_id) == pytest.approx(expected), name
    assert [b.interest for b in library.blueprints(OTHER)] == [0.6], "another site, another matter"
    assert min(after(SeedState.CULLED, -1.0, f"-{n}", kernel.kernel_id) for n in range(60)) >= 0
    assert max(after(*gained, f"+{n}", kernel.kernel_id) for n in range(60)) <= 1
