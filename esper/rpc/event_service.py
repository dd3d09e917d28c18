"""`EventService` over a library: what is published goes into it, what it keeps goes out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from esper.errors import ContractError
from esper.leyline.events import Event, Topic
from esper.leyline.library import EventStore
from esper.leyline.proto.v1 import events_pb2 as pb
from esper.leyline.proto.v1 import events_pb2_grpc
from esper.leyline.proto.wire import enum_to_contract, to_contract, to_wire
from esper.rpc.answering import Streams, answers

LOOK_SECONDS = 0.2  # between looks; another process may write the same library


class EventServicer(events_pb2_grpc.EventServiceServicer):
    """Subscriptions by name; a name is read by one stream at a time, the one opened last."""

    def __init__(self, events: EventStore, streams: Streams) -> None:
        self._events, self._streams = events, streams
        self._lock = threading.Lock()
        self._readers: dict[str, object] = {}

    @answers
    def Publish(self, request: Any, context: Any) -> Any:
        self._events.publish(to_contract(Event, request.event))
        return pb.PublishResponse(decision=pb.DECISION_ACCEPTED)

    @answers
    def Subscribe(self, request: Any, context: Any) -> Iterator[Any]:
        with self._streams.one():
            first = next(request, None)
            if first is None or first.WhichOneof("part") != "open" or not first.open.name:
                raise ContractError("a subscription begins with `open` and its name")
            name, reader = first.open.name, object()
            self._events.subscribe(
                name, frozenset(enum_to_contract(Topic, t) for t in first.open.topics)
            )
            with self._lock:
                self._readers[name] = reader
            try:
                while context.is_active() and not self._streams.stopping.is_set():
                    if self._readers.get(name) is not reader:
                        return  # its owner opened it again and reads there
                    event = self._events.next_event(name)
                    if event is None:
                        self._streams.stopping.wait(LOOK_SECONDS)
                        continue
                    yield to_wire(event)
                    answer = next(request, None)
                    if answer is None:
                        return
                    if answer.acknowledge != event.event_id:
                        raise ContractError(
                            f"{answer.acknowledge!r} is not the event that was sent last"
                        )
                    self._events.acknowledge(name, event.event_id)
            finally:
                with self._lock:
                    if self._readers.get(name) is reader:
                        del self._readers[name]
