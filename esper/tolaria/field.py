"""What a session reports of its seeds, for those who learn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.kasmina.seed import Seed
from esper.leyline.command import Command, FieldReport, SeedContext
from esper.tamiyo.features import context_of
from esper.tamiyo.state import Catalog, SystemState

if TYPE_CHECKING:
    from esper.tolaria.session import Session


def germinated(session: Session, command: Command, state: SystemState, catalog: Catalog) -> None:
    """Remember when a seed was born, and in what situation it was chosen."""
    session._born[command.trace_id] = session.growth.epoch
    context = context_of(command, state, catalog, session.policy)
    if context is not None:
        session._contexts[command.trace_id] = context.model_dump(mode="json")


def field_report(session: Session, seed: Seed, reason: str) -> FieldReport:
    """What became of a seed that has come to its end; what was remembered of it is forgotten."""
    evidence = session._evidence.pop(seed.trace_id, None)
    context = session._contexts.pop(seed.trace_id, None)
    return FieldReport(
        run_id=session.run_id, trace_id=seed.trace_id, site=seed.site.name,
        kernel_id=seed.kernel_id, blueprint_id=seed.blueprint_id, outcome=seed.state,
        reason=reason, gain=evidence[0] if evidence else None,
        loss_before=evidence[1] if evidence else None,
        loss_after=evidence[2] if evidence else None,
        epochs=session.growth.epoch - session._born.get(seed.trace_id, session.growth.epoch),
        context=SeedContext.model_validate(context) if context is not None else None,
    )
