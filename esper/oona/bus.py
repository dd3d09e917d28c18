"""The in-process event bus.

Publishing never blocks and never raises: it puts the event into a bounded queue and says what
became of it. One daemon thread delivers, most urgent first. An event is acknowledged to a
subscriber when the handler returns; a handler that raises gets the event again, up to
`attempts` times, so handlers must be idempotent. Events live in memory: those that were not
delivered when the process dies are lost, and what must survive is published to the library.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from esper.leyline.events import Event, Topic
from esper.oona.queue import Admission, BoundedQueue, Decision

Handler = Callable[[Event], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BusStats:
    """Counts since the bus began. `errors` counts raised handlers, `abandoned` deliveries that
    failed on every attempt; `dropped` were accepted first and displaced later."""

    published: int = 0
    refused: int = 0
    dropped: int = 0
    acknowledged: int = 0
    errors: int = 0
    abandoned: int = 0


class Bus:
    """Subscribers by topic, one delivering thread. All methods are thread-safe.

    Handlers run on the bus's thread, one after the other: a slow handler delays every other,
    and a hung one lets the queue fill up until producers are refused. They may publish and
    subscribe. A forked child starts with an empty queue and the same subscribers, because the
    parent's thread, which does not exist there, will deliver what was queued.
    """

    def __init__(
        self,
        limit: int = 1024,
        attempts: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._attempts, self._clock = limit, max(1, attempts), clock
        self._handlers: list[tuple[Topic | None, Handler]] = []
        self._stats = BusStats()
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._queue: BoundedQueue[Event] = BoundedQueue(self._limit, self._clock)
        self._delivering = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def _lock(self) -> threading.Condition:
        if self._pid != os.getpid():
            self._begin()  # the parent's lock may have been held when this process was forked
        return self._changed

    def subscribe(self, topic: Topic | None, handler: Handler) -> Callable[[], None]:
        """Call `handler` for each event of `topic` (all topics if None) delivered from now on.

        Returns:
            A function that ends the subscription; calling it twice is harmless.
        """
        entry = (topic, handler)
        with self._lock():
            self._handlers = [*self._handlers, entry]

        def unsubscribe() -> None:
            with self._lock():
                self._handlers = [h for h in self._handlers if h is not entry]

        return unsubscribe

    def publish(self, event: Event) -> Admission[Event]:
        """Queue `event`; the answer says whether it was, and which event made room for it."""
        with self._lock():
            if self._closed:
                self._count(refused=1)
                return Admission(Decision.REFUSED, reason="the bus is closed; nothing is delivered")
            admission = self._queue.offer(event, event.priority)
            if not admission.accepted:
                self._count(refused=1)
                return admission
            self._count(published=1, dropped=int(admission.dropped is not None))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="oona-bus", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return admission

    def flush(self, timeout: float) -> bool:
        """Wait until everything queued is delivered; False where `timeout` seconds were not
        enough. Called from a handler it would wait for itself, so it returns False at once."""
        with self._lock():
            if threading.current_thread() is self._thread:
                return False
            return self._changed.wait_for(
                lambda: not len(self._queue) and not self._delivering, timeout
            )

    def close(self, timeout: float = 5.0) -> int:
        """Refuse new events, deliver the queued ones for at most `timeout` seconds.

        Returns:
            How many events were left undelivered; 0 is a clean end.
        """
        with self._lock():
            self._closed = True
            self._changed.notify_all()
        self.flush(timeout)
        with self._lock():
            left = len(self._queue) + int(self._delivering)
            while self._queue.pop() is not None:
                pass  # the thread must not go on delivering after the deadline
        if left:
            log.warning("the bus closed with %d events undelivered after %.1f s", left, timeout)
        return left

    def stats(self) -> BusStats:
        with self._lock():
            return self._stats

    def depth(self) -> int:
        """How many events wait."""
        with self._lock():
            return len(self._queue)

    def _count(self, **more: int) -> None:
        now = {name: getattr(self._stats, name) + n for name, n in more.items()}
        self._stats = replace(self._stats, **now)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._queue) or self._closed)
                event = self._queue.pop()
                if event is None:
                    return  # closed and drained
                self._delivering = True
                handlers = self._handlers
            try:
                for topic, handler in handlers:
                    if topic is None or topic is event.topic:
                        self._deliver(event, handler)
            finally:
                with self._changed:
                    self._delivering = False
                    self._changed.notify_all()

    def _deliver(self, event: Event, handler: Handler) -> None:
        for attempt in range(1, self._attempts + 1):
            try:
                handler(event)
            except Exception:
                log.exception(
                    "handler %r failed on event %s (%s), attempt %d of %d",
                    handler, event.event_id, event.topic, attempt, self._attempts,
                )
                with self._changed:
                    self._count(errors=1, abandoned=int(attempt == self._attempts))
            else:
                with self._changed:
                    self._count(acknowledged=1)
                return
