"""Events over the network: at least once, acknowledged after the work."""

from __future__ import annotations

from typing import Any

import pytest

from esper.leyline.events import Event, Topic
from esper.oona.bus import Bus
from esper.rpc import event_service
from esper.rpc.address import Address
from esper.rpc.remote_bus import RemoteBus
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.rpc.support import wait_until


def event(n: int, topic: Topic = Topic.EPOCH) -> Event:
    return Event(event_id=f"ev-{n}", topic=topic, sender="test", body={"n": n})


def test_events_cross_and_come_again_until_their_work_is_done(
    local: LocalLibrary, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_service, "_LOOK_SECONDS", 0.05)
    bus = Bus()
    with Server(local, address, bus=bus):
        remote = RemoteBus(str(address))
        seen: list[str] = []
        fail = [True]

        def handler(e: Event) -> None:
            seen.append(e.event_id)
            if fail.pop() if fail else False:
                raise RuntimeError("once")

        leave = remote.subscribe(Topic.EPOCH, handler)
        assert wait_until(lambda: bus._handlers)
        bus.publish(event(1))
        assert remote.publish(event(2, Topic.ROLLBACK)).accepted
        assert remote.publish(event(3)).accepted
        assert wait_until(lambda: len(seen) == 3)
        assert seen == ["ev-1", "ev-1", "ev-3"], "a failed handler gets the event again"
        leave()
        bus.publish(event(4))
        assert bus.flush(5) and len(seen) == 3
        remote.close()


def test_an_event_that_was_not_acknowledged_survives_its_connection(
    local: LocalLibrary, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_service, "_LOOK_SECONDS", 0.05)
    bus = Bus()
    with Server(local, address, bus=bus):
        remote = RemoteBus(str(address))
        seen: list[str] = []
        calls: list[Any] = []
        subscribe = remote._stub.Subscribe

        def remembered(*given: Any, **named: Any) -> Any:
            calls.append(subscribe(*given, **named))
            return calls[-1]

        def cut_on_the_first(e: Event) -> None:
            seen.append(e.event_id)
            if len(seen) == 1:
                calls[-1].cancel()  # the connection breaks before the acknowledgement

        monkeypatch.setattr(remote._stub, "Subscribe", remembered)
        remote.subscribe(None, cut_on_the_first)
        assert wait_until(lambda: bus._handlers)
        bus.publish(event(1))
        bus.publish(event(2))
        assert wait_until(lambda: len(seen) == 3), seen
        assert seen == ["ev-1", "ev-1", "ev-2"]
        remote.close()
