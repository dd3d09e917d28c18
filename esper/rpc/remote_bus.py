"""A bus behind a server: publish and subscribe over gRPC."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from esper.errors import AccessDenied, Unreachable
from esper.leyline.events import Event, Topic
from esper.leyline.proto.v1 import events_pb2 as pb
from esper.leyline.proto.v1.events_pb2_grpc import EventServiceStub
from esper.leyline.proto.wire import enum_to_wire, to_contract, to_wire
from esper.rpc.address import Access, parse_address
from esper.rpc.channel import CALL_SECONDS, STREAM_SECONDS, connect
from esper.rpc.failures import error_of

log = logging.getLogger(__name__)
ATTEMPTS = 3  # per event, as in the bus itself
_AGAIN_SECONDS = 0.5  # between two tries to reach the server


class RemoteBus:
    """Publishing waits for the answer of the server: this is not for the training thread.

    Delivery is at least once: an event is acknowledged after its handler returned, and comes
    again where the connection broke before, or either process was killed. A handler that raises
    gets the event again, up to `ATTEMPTS` times.
    """

    def __init__(self, address: str, access: Access | None = None) -> None:
        self.address = parse_address(address)
        self._channel = connect(self.address, access or Access())
        self._stub = EventServiceStub(self._channel)
        self._leave: list[Callable[[], None]] = []

    def publish(self, event: Event) -> None:
        """Hand `event` to the server, which keeps it for who subscribed to its topic.

        Raises:
            Unreachable: no answer within the deadline; the event may be there, or not.
            ContractError: see `Publishing`.
        """
        try:
            self._stub.Publish(
                pb.PublishRequest(event=to_wire(event)), timeout=CALL_SECONDS, wait_for_ready=True
            )
        except grpc.RpcError as e:
            raise error_of(e, self.address) from e

    def subscribe(
        self, topic: Topic | None, handler: Callable[[Event], None], *, name: str
    ) -> Callable[[], None]:
        """Call `handler`, on a thread of its own, for each event of `topic` (None: of all).

        What is not acknowledged is kept under `name`, the subscriber's own: who comes back under
        it within a day finds what he missed.

        Returns:
            A function that stops reading; calling it twice is harmless.
        """
        stop = threading.Event()
        running: list[Any] = []

        def run() -> None:
            while not stop.is_set():
                try:
                    for event in self._events(topic, name, running):
                        _handle(event, handler)
                except AccessDenied as e:
                    log.error("no events: %s", e)
                    return
                except Unreachable as e:
                    log.info("subscribing again: %s", e)
                except Exception as e:
                    if not stop.is_set():
                        log.warning("subscribing again: %s", e)
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

    def events(self, topic: Topic | None, *, name: str) -> Iterator[Event]:
        """The same events, for ever, on the caller's thread: each is acknowledged when the next
        one is asked for. A server that went away is waited for.

        Raises:
            AccessDenied: the token does not allow it.
        """
        while True:
            try:
                yield from self._events(topic, name, [])
            except Unreachable as e:
                log.info("subscribing again: %s", e)
            time.sleep(_AGAIN_SECONDS)

    def _events(self, topic: Topic | None, name: str, running: list[Any]) -> Iterator[Event]:
        """Those of one connection; `running` is told the call, so that it can be cancelled."""
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
                yield event
                answers.put(pb.SubscribeRequest(acknowledge=event.event_id))
        except grpc.RpcError as e:
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
