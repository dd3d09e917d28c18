"""Events: what happened, once, with the trail that led to it."""

from __future__ import annotations

import time
import uuid
from enum import IntEnum, StrEnum
from typing import Any, Literal

from pydantic import Field

from esper.leyline.base import Contract


class Topic(StrEnum):
    SEED_HEALTH = "telemetry.seed.health"
    COMMANDS = "control.kasmina.commands"
    FIELD_REPORTS = "innovation.field_reports"
    BLUEPRINT_SUBMITTED = "compilation.blueprint.submitted"
    KERNEL_READY = "compilation.kernel.ready"
    KERNEL_CHARACTERIZED = "validation.kernel.characterized"
    EPOCH = "system.events.epoch"
    ROLLBACK = "system.events.rollback"
    CAPACITY = "system.capacity.updates"


class Priority(IntEnum):
    """0 is the most urgent; section 6.3.2 of the design."""

    EMERGENCY = 0
    STRATEGIC = 1
    NORMAL = 2
    EXPERIMENTAL = 3
    BACKGROUND = 4


def new_id(prefix: str) -> str:
    """A fresh random id, for things that have no content to hash."""
    return f"{prefix}-{uuid.uuid4().hex[:16]}"


class Event(Contract):
    """The envelope. `trace_id` ties trigger, decision, command, transition and outcome.

    `time` is seconds since the epoch, UTC. `body` is JSON; `esper.leyline.payloads` says which
    topics have a contract for it.
    """

    event_id: str = Field(default_factory=lambda: new_id("ev"))
    topic: Topic
    sender: str
    time: float = Field(default_factory=time.time)
    trace_id: str = Field(default_factory=lambda: new_id("tr"))
    priority: Priority = Priority.NORMAL
    schema_version: Literal[1] = 1
    body: dict[str, Any] = Field(default_factory=dict)
