"""What a session tells the outside: how its seeds are, and what was considered, each thing once.

Nothing here waits for anybody. What goes to a library that passes events on is sent by a thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from esper.kasmina.growth import Growth
from esper.leyline.base import Contract
from esper.leyline.command import Command, SeedHealth
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import Publishing
from esper.leyline.payloads import announce
from esper.tamiyo.state import Decision, SiteStatus
from esper.tolaria.summary import EpochSummary

log = logging.getLogger(__name__)
QUEUED = 1024  # events for a library that does not answer; later ones are lost to it


def seed_health(growth: Growth, sites: Sequence[SiteStatus], run_id: str) -> Iterator[Event]:
    """One event for each seed on its way. Synchronizes with the device: for epoch boundaries."""
    gains = {s.trace_id: s.gain for s in sites}
    for seed in growth.active():
        health = SeedHealth(
            run_id=run_id, trace_id=seed.trace_id, site=seed.site.name, kernel_id=seed.kernel_id,
            state=seed.state, epoch=growth.epoch, step=growth.step, alpha=seed.alpha,
            drift=seed.drift, grad_norm=seed.grad_norm(), gain=gains.get(seed.trace_id),
        )
        yield announce(Topic.SEED_HEALTH, health, sender="kasmina", trace_id=seed.trace_id)


def epoch_event(run_id: str, summary: EpochSummary) -> Event:
    return Event(topic=Topic.EPOCH, sender="tolaria", body={
        "run_id": run_id, "epoch": summary.epoch, "step": summary.step,
        "train_loss": summary.train_loss, "holdout_loss": summary.holdout_loss,
        "decision_seconds": summary.decision_seconds,
        "budgets": [vars(b) for b in summary.decision.budgets]})


def rollback_event(run_id: str, reason: str, step: int, seconds: float) -> Event:
    return Event(topic=Topic.ROLLBACK, sender="tolaria", priority=Priority.EMERGENCY, body={
        "run_id": run_id, "reason": reason, "step": step, "seconds": seconds})


class Considerations:
    """Remembers what was last said of each kernel at each site.

    A policy looks at the same kernels at every boundary, mostly with the same result. Said once,
    and again when it changes, that is as complete and can be read.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], str] = {}
        self._put_off = ""

    def news(self, decision: Decision) -> dict[str, Any]:
        """What of `decision` has not been said, {} where all has. A choice is always news;
        `unchanged` counts the kernels of which the last word still holds."""
        fresh = [c for c in decision.considered
                 if c.chosen or self._said.get((c.site, c.kernel_id)) != c.reason]
        for c in decision.considered:
            # Of what was chosen the next word is news, even if it is the same.
            self._said[c.site, c.kernel_id] = "" if c.chosen else c.reason
        put_off = decision.put_off if decision.put_off != self._put_off else ""
        self._put_off = decision.put_off
        if not fresh and not put_off:
            return {}
        return {"considered": [vars(c) for c in fresh],
                "unchanged": len(decision.considered) - len(fresh), "put_off": put_off}


class Outgoing:
    """An observer that hands events and commands to a library, for who subscribed to them.

    A library that does not answer costs these events and nothing else.
    """

    def __init__(self, library: Publishing) -> None:
        self._library = library
        self._queue: queue.Queue[Event | None] = queue.Queue(QUEUED)
        self._lost = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-outgoing", daemon=True)
        self._thread.start()

    def __call__(self, record: Contract) -> None:
        if isinstance(record, Command):
            record = Event(topic=Topic.COMMANDS, sender="tamiyo", trace_id=record.trace_id,
                           body={"command": record.model_dump(mode="json")})
        if not isinstance(record, Event):
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lose("the library does not keep up")

    def _run(self) -> None:
        while (event := self._queue.get()) is not None and not self._closing.is_set():
            try:
                self._library.publish(event)
            except Exception as e:
                self._lose(str(e))

    def _lose(self, why: str) -> None:
        if not self._lost:
            log.warning("events do not reach the library's subscribers: %s", why)
        self._lost += 1

    def close(self, timeout: float = 5.0) -> None:
        """Send what is queued, for at most `timeout` seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(timeout)
        self._closing.set()  # should it still wait for an answer, that is the last one
        if self._lost:
            log.warning("%d events did not reach the library's subscribers", self._lost)


def outgoing(library: object) -> Outgoing | None:
    """Where a session's events go; None where nothing is to be told."""
    return Outgoing(library) if isinstance(library, Publishing) else None
