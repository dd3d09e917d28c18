"""A bus behind a server: publish and subscribe over gRPC."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from esper.errors import AccessDenied, Unreachable
from esper.leyline.events import Event, Topic, new_id
from esper.leyline.proto.v1 import events_pb2 as pb
from esper.leyline.proto.v1.events_pb2_grpc import EventServiceStub
from esper.leyline.proto.wire import enum_to_wire, to_contract, to_wire
from esper.oona.queue import Admission, Decision
from esper.rpc.address import Access, parse_address
from esper.rpc.channel import CALL_SECONDS, STREAM_SECONDS, connect
from esper.rpc.failures import error_of

log = logging.getLogger(__name__)
ATTEMPTS = 3  # per event, as in the bus itself
_AGAIN_SECONDS = 0.5  # between two tries to reach the server


class RemoteBus:
    """Publishing waits for the answer of the server: this is not for the training thread.

    Delivery is at least once for as long as the server runs: an event is acknowledged after
    its handler returned, and comes again where the connection broke before. A handler that
    raises gets the event again, up to `ATTEMPTS` times.
    """

    def __init__(self, address: str, access: Access | None = None) -> None:
        self.address = parse_address(address)
        self._channel = connect(self.address, access or Access())
        self._stub = EventServiceStub(self._channel)
        self._leave: list[Callable[[], None]] = []

    def publish(self, event: Event) -> Admission[Event]:
        """Hand `event` to the server's bus; the answer is that bus's own.

        Raises:
            Unreachable: no answer within the deadline; the event may be there, or not.
        """
        try:
            answer = self._stub.Publish(
                pb.PublishRequest(event=to_wire(event)), timeout=CALL_SECONDS, wait_for_ready=True
            )
        except grpc.RpcError as e:
            raise error_of(e, self.address) from e
        dropped = to_contract(Event, answer.dropped) if answer.HasField("dropped") else None
        decision = pb.Decision.Name(answer.decision).removeprefix("DECISION_")
        return Admission(Decision(decision), dropped, answer.reason)

    def subscribe(
        self, topic: Topic | None, handler: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call `handler`, on a thread of its own, for each event of `topic` (None: of all).

        Returns:
            A function that ends the subscription; calling it twice is harmless.
        """
        stop = threading.Event()
        running: list[Any] = []

        def run() -> None:
            name = new_id("sub")
            while not stop.is_set():
                try:
                    self._read(name, topic, handler, stop, running)
                except AccessDenied as e:
                    log.error("no events: %s", e)
                    return
                except Unreachable as e:
                    log.info("subscribing again: %s", e)
                except Exception:
                    log.exception("subscribing again")
                stop.wait(_AGAIN_SECONDS)

        thread = threading.Thread(target=run, name="esper-events", daemon=True)

        def leave() -> None:
            stop.set()
            for call in running:
                call.cancel()
            if threading.current_thread() is not thread:
                thread.join()

        thread.start()
        self._leave.append(leave)
        return leave

    def close(self) -> None:
        """End all subscriptions and the connection."""
        for leave in self._leave:
            leave()
        self._channel.close()

    def _read(
        self, name: str, topic: Topic | None, handler: Callable[[Event], None],
        stop: threading.Event, running: list[Any],
    ) -> None:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        answers.put(pb.SubscribeRequest(open=pb.Subscription(
            name=name, topics=[] if topic is None else [enum_to_wire(topic)])))

        def requests() -> Iterator[Any]:
            while (request := answers.get()) is not None:
                yield request

        call = self._stub.Subscribe(requests(), timeout=STREAM_SECONDS, wait_for_ready=True)
        running[:] = [call]
        try:
            for message in call:
                event = to_contract(Event, message)
                _handle(event, handler)
                answers.put(pb.SubscribeRequest(acknowledge=event.event_id))
                if stop.is_set():
                    return
        except grpc.RpcError as e:
            if not stop.is_set():
                raise error_of(e, self.address) from e
        finally:
            answers.put(None)
            call.cancel()


def _handle(event: Event, handler: Callable[[Event], None]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            handler(event)
        except Exception:
            log.exception("handler %r failed on event %s (%s), attempt %d of %d",
                          handler, event.event_id, event.topic, attempt, ATTEMPTS)
        else:
            return
