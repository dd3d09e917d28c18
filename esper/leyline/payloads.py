"""What the events of a topic say: one contract for each topic whose facts have one.

The body of such an event is the contract's JSON form; on the wire it is the contract's message.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from esper.errors import ContractError
from esper.leyline.base import Contract, sha256
from esper.leyline.command import FieldReport, SeedHealth
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import BlueprintRecord, KernelRecord

PAYLOADS: Mapping[Topic, type[Contract]] = {
    Topic.SEED_HEALTH: SeedHealth,
    Topic.FIELD_REPORTS: FieldReport,
    Topic.BLUEPRINT_SUBMITTED: BlueprintRecord,
    Topic.KERNEL_READY: KernelRecord,
    Topic.KERNEL_CHARACTERIZED: KernelRecord,
}
# The library says these itself, in the transaction that makes them true; nobody else may.
LIBRARY_TOPICS = frozenset({
    Topic.FIELD_REPORTS, Topic.BLUEPRINT_SUBMITTED, Topic.KERNEL_READY,
    Topic.KERNEL_CHARACTERIZED,
})


def announce(
    topic: Topic, payload: Contract, *, sender: str, trace_id: str,
    priority: Priority = Priority.NORMAL,
) -> Event:
    """An event that says `payload`."""
    return Event(topic=topic, sender=sender, trace_id=trace_id, priority=priority,
                 body=payload.model_dump(mode="json"))


def payload_of(event: Event) -> Contract:
    """What `event` says, as the contract of its topic.

    Raises:
        ContractError: the topic has no contract, or the body breaks it.
    """
    contract = PAYLOADS.get(event.topic)
    if contract is None:
        raise ContractError(
            f"events of {event.topic} have a free body; those with a contract are "
            f"{', '.join(PAYLOADS)}"
        )
    try:
        return contract.model_validate(event.body)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "its top"
        raise ContractError(
            f"the body of {event.event_id} ({event.topic}) is no {contract.__name__}: "
            f"{first['msg']} (at {where})"
        ) from e


def pipeline_trace(blueprint_id: str, signature_id: str) -> str:
    """The trace of everything that becomes of a blueprint for a signature before it is used. A
    command names blueprint and kernel, which leads from a seed's trace to this one."""
    return f"tr-{sha256(f'{blueprint_id} {signature_id}'.encode())[:16]}"
