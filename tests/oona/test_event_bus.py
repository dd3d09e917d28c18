"""The bus: publishing never waits, delivery survives bad handlers, closing drains."""

from __future__ import annotations

import os
import threading
import time

import pytest

from esper.leyline.events import Event, Priority, Topic
from esper.oona.bus import Bus


def event(topic: Topic = Topic.EPOCH, priority: Priority = Priority.NORMAL) -> Event:
    return Event(topic=topic, sender="test", priority=priority)


def test_subscribers_get_their_topics_in_order_until_they_leave() -> None:
    bus, epochs, everything = Bus(), [], []
    leave = bus.subscribe(Topic.EPOCH, epochs.append)
    bus.subscribe(None, everything.append)
    sent = [event(), event(Topic.ROLLBACK), event()]
    for e in sent:
        assert bus.publish(e).accepted
    assert bus.flush(5)
    leave()
    leave()
    bus.publish(event())
    assert bus.close() == 0
    assert epochs == [sent[0], sent[2]] and everything[:3] == sent and len(everything) == 4
    assert not bus.publish(event()).accepted, "a closed bus tells its producers"


def test_a_failing_handler_is_retried_counted_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus, seen, tries = Bus(attempts=3), [], []

    def flaky(e: Event) -> None:
        tries.append(e)
        if len(tries) < 3:
            raise RuntimeError("not yet")

    def broken(e: Event) -> None:
        raise RuntimeError("never")

    for handler in (flaky, broken, seen.append):
        bus.subscribe(Topic.EPOCH, handler)
    bus.publish(event())
    assert bus.close() == 0
    assert len(tries) == 3 and len(seen) == 1
    stats = bus.stats()
    assert (stats.acknowledged, stats.errors, stats.abandoned) == (2, 5, 1)
    assert "attempt 3 of 3" in caplog.text


def test_publishing_beside_a_stuck_handler_never_waits_and_says_what_was_dropped() -> None:
    bus, go, seen, entered = Bus(limit=2), threading.Event(), [], threading.Event()

    def stuck(e: Event) -> None:
        entered.set()
        go.wait(10)
        seen.append(e)

    bus.subscribe(None, stuck)
    first = event()
    bus.publish(first)
    assert entered.wait(60)
    low, normal = event(priority=Priority.BACKGROUND), event()
    assert bus.publish(low).accepted and bus.publish(normal).accepted
    refused = bus.publish(event(priority=Priority.BACKGROUND))
    assert not refused.accepted and "full" in refused.reason
    urgent = event(priority=Priority.EMERGENCY)
    assert bus.publish(urgent).dropped == low
    assert bus.close(timeout=0.05) == 3, "the deadline passes: one in flight, two waiting"
    go.set()
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [first], "nothing is delivered after the deadline"
    assert (bus.stats().dropped, bus.stats().refused) == (1, 1)


def test_a_handler_may_publish_and_flush_does_not_wait_for_itself() -> None:
    bus, seen, flushed = Bus(), [], []

    def relay(e: Event) -> None:
        bus.publish(event(Topic.ROLLBACK))
        flushed.append(bus.flush(10))

    bus.subscribe(Topic.EPOCH, relay)
    bus.subscribe(Topic.ROLLBACK, seen.append)
    bus.publish(event())
    assert bus.flush(5) and bus.close() == 0
    assert flushed == [False] and len(seen) == 1


def test_a_forked_child_delivers_its_own_events_only() -> None:
    bus, go, seen, entered = Bus(), threading.Event(), [], threading.Event()

    def handler(e: Event) -> None:
        entered.set()
        go.wait(10)
        seen.append(e)

    bus.subscribe(None, handler)
    bus.publish(event())
    bus.publish(event())
    assert entered.wait(60)
    pid = os.fork()
    if pid == 0:
        go.set()
        mine = event()
        bus.publish(mine)
        os._exit(0 if bus.flush(5) and seen == [mine] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    go.set()
    assert bus.close() == 0 and len(seen) == 2
