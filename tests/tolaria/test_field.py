"""What a session reports of a seed: in which situation it was chosen, also over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper.leyline.command import Action, FieldReport
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.state import Catalog
from esper.tolaria import resume
from esper.tolaria.session import Session
from esper.tolaria.trainer import Trainer
from tests.support import bottleneck, opened
from tests.tolaria.test_session import Scripted, loss_fn, make_session

SCRIPT = {2: [(Action.GERMINATE, "3")], 5: [(Action.CULL, "3")]}


def session_with(kernel: KernelRecord) -> tuple[Session, Any, list[FieldReport]]:
    policy = Scripted(SCRIPT)
    policy.version = "bandit-7"  # type: ignore[attr-defined]
    session, data = make_session(policy=policy)
    before = FieldReport(run_id="another", trace_id="t", site="s", kernel_id="k", reason="",
                         blueprint_id=kernel.blueprint_id, outcome=SeedState.FOSSILIZED, gain=0.5,
                         loss_before=2.0, epochs=3)
    session._link.catalog = (  # type: ignore[method-assign]
        lambda run_id, now: Catalog((kernel,), (before,)))
    found: list[FieldReport] = []
    session.observers.append(lambda r: found.append(r) if isinstance(r, FieldReport) else None)
    return session, data, found


@pytest.fixture
def kernel() -> KernelRecord:
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    manifest = opened(bottleneck(SiteKind.FEATURES), signature).manifest.model_copy(
        update={"flops": 300})
    return KernelRecord(kernel_id="k-test", blueprint_id="bp-test", manifest=manifest, size=1,
                        digest="0" * 64, status=KernelStatus.VALIDATED, created=0, updated=0)


def train(session: Session, data: Any, epochs: int) -> None:
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(epochs)
    session.close()


def test_a_report_says_in_which_situation_its_seed_was_chosen(kernel: KernelRecord) -> None:
    session, data, reports = session_with(kernel)
    train(session, data, 6)
    (report,) = reports
    context = report.context
    assert report.outcome is SeedState.CULLED and context is not None
    assert context.policy == "bandit-7" and context.site == kernel.manifest.signature
    assert (context.depth, context.fossils, context.epoch, context.growths) == (1.0, 0, 2, 0)
    assert (context.parameters, context.flops, context.layers, context.width, context.taps) == (
        12 * 6 + 6 + 6 * 12 + 12, 300, 2, 1.0, 1)
    assert context.speedup is None and context.tried == 1
    assert context.earned == pytest.approx(0.125)
    losses = session.policy.seen[1].holdout_losses  # type: ignore[attr-defined]
    assert context.loss_share == losses[1] / losses[0]


@pytest.mark.parametrize("old", [False, True])
def test_a_context_is_kept_over_a_resume_and_missed_by_no_older_checkpoint(
    tmp_path: Path, kernel: KernelRecord, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, data, _ = session_with(kernel)
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(3)
    with monkeypatch.context() as patch:
        if old:
            kept = tuple(name for name in resume._KEPT if name != "_contexts")
            patch.setattr(resume, "_KEPT", kept)
        path = session.save(tmp_path / "kept").result()
    (context,) = session._contexts.values()
    session.close()
    session, data, reports = session_with(kernel)
    resume.restore(session, path)
    train(session, data, 6)
    (report,) = reports
    assert (report.context is None) if old else (
        report.context is not None
        and report.context.model_dump(mode="json") == context)
