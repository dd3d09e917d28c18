"""`EventService` over a bus: what is published there goes into it, what it delivers goes out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from esper.errors import ContractError, QueueFull
from esper.leyline.events import Event, Topic
from esper.leyline.proto.v1 import events_pb2 as pb
from esper.leyline.proto.v1 import events_pb2_grpc
from esper.leyline.proto.wire import enum_to_contract, to_contract, to_wire
from esper.oona.bus import Bus
from esper.oona.queue import BoundedQueue
from esper.rpc.answering import MAX_STREAMS, Streams, answers

log = logging.getLogger(__name__)
QUEUE_LIMIT = 1024  # events that wait for one subscriber
KEPT_SECONDS = 300.0  # of a subscription that nobody reads: its owner may come back
_LOOK_SECONDS = 0.5  # how soon a stream notices that its caller is gone


class _Subscription:
    """One subscriber's queue. The event that was sent stays until it is acknowledged."""

    def __init__(self, topics: frozenset[Topic]) -> None:
        self.topics = topics
        self.leave: Callable[[], None] = lambda: None
        self.changed = threading.Condition()
        self.reader: object | None = None  # whose stream it is now
        self.left = time.monotonic()
        self._queue: BoundedQueue[Event] = BoundedQueue(QUEUE_LIMIT)
        self._sent: Event | None = None

    def offer(self, event: Event) -> None:
        if self.topics and event.topic not in self.topics:
            return
        with self.changed:
            admission = self._queue.offer(event, event.priority)
            self.changed.notify_all()
        lost = event if not admission.accepted else admission.dropped
        if lost is not None:
            log.warning("a subscriber is too slow; %s is lost: %s", lost.event_id, admission.reason)

    def next(self, reader: object, timeout: float) -> Event | None:
        """The event to be sent next, the last one again if it was not acknowledged."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.reader is not reader or self._sent is not None or len(self._queue),
                timeout,
            )
            if self.reader is not reader:
                return None
            if self._sent is None:
                self._sent = self._queue.pop()
            return self._sent

    def acknowledge(self, event_id: str) -> None:
        with self.changed:
            if self._sent is None or self._sent.event_id != event_id:
                raise ContractError(f"{event_id!r} is not the event that was sent last")
            self._sent = None


class EventServicer(events_pb2_grpc.EventServiceServicer):
    """Subscriptions by name. One whose stream broke keeps its events for a while."""

    def __init__(self, bus: Bus, streams: Streams) -> None:
        self._bus, self._streams = bus, streams
        self._lock = threading.Lock()
        self._subscriptions: dict[str, _Subscription] = {}

    @answers
    def Publish(self, request: Any, context: Any) -> Any:
        admission = self._bus.publish(to_contract(Event, request.event))
        return pb.PublishResponse(
            decision=f"DECISION_{admission.decision}",
            dropped=None if admission.dropped is None else to_wire(admission.dropped),
            reason=admission.reason,
        )

    @answers
    def Subscribe(self, request: Any, context: Any) -> Iterator[Any]:
        with self._streams.one():
            first = next(request, None)
            if first is None or first.WhichOneof("part") != "open" or not first.open.name:
                raise ContractError("a subscription begins with `open` and its name")
            topics = frozenset(enum_to_contract(Topic, t) for t in first.open.topics)
            reader = object()
            subscription = self._attach(first.open.name, topics, reader)
            try:
                while context.is_active() and not self._streams.stopping.is_set():
                    event = subscription.next(reader, _LOOK_SECONDS)
                    if subscription.reader is not reader:
                        return  # its owner opened it again and reads there
                    if event is None:
                        continue
                    yield to_wire(event)
                    answer = next(request, None)
                    if answer is None:
                        return
                    subscription.acknowledge(answer.acknowledge)
            finally:
                with subscription.changed:
                    if subscription.reader is reader:
                        subscription.reader = None
                        subscription.left = time.monotonic()

    def _attach(self, name: str, topics: frozenset[Topic], reader: object) -> _Subscription:
        with self._lock:
            now = time.monotonic()
            for other, kept in list(self._subscriptions.items()):
                if kept.reader is None and now - kept.left > KEPT_SECONDS:
                    kept.leave()
                    del self._subscriptions[other]
            subscription = self._subscriptions.get(name)
            if subscription is None or subscription.topics != topics:
                if subscription is not None:
                    subscription.leave()
                elif len(self._subscriptions) >= 2 * MAX_STREAMS:
                    raise QueueFull(
                        f"{len(self._subscriptions)} subscriptions are kept; try again later"
                    )
                subscription = self._subscriptions[name] = _Subscription(topics)
                subscription.leave = self._bus.subscribe(None, subscription.offer)
            with subscription.changed:
                subscription.reader = reader
                subscription.changed.notify_all()
            return subscription
