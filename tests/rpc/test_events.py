"""Events over the network: at least once, acknowledged after the work, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esper.errors import ContractError
from esper.leyline.command import FieldReport, SeedHealth
from esper.leyline.events import Event, Topic
from esper.leyline.lifecycle import SeedState
from esper.leyline.payloads import announce, payload_of, pipeline_trace
from esper.leyline.proto.v1 import events_pb2
from esper.leyline.proto.wire import to_wire
from esper.oona.bus import Bus
from esper.rpc.address import Address
from esper.rpc.client import RemoteLibrary
from esper.rpc.remote_bus import RemoteBus
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.leyline.wire_samples import KERNEL
from tests.rpc.support import wait_until
from tests.urza.support import SIG, artifact, blueprint, report


def event(n: int, topic: Topic = Topic.EPOCH) -> Event:
    return Event(event_id=f"ev-{n}", topic=topic, sender="test", body={"n": n})


def subscribed(library: LocalLibrary, name: str) -> Callable[[], bool]:
    def look() -> bool:
        with library._store.read() as con:
            return bool(con.execute(
                "SELECT 1 FROM subscriptions WHERE name = ?", (name,)).fetchone())

    return look


def test_events_cross_and_come_again_until_their_work_is_done(
    local: LocalLibrary, address: Address
) -> None:
    bus = Bus()
    with Server(local, address, bus=bus):
        remote = RemoteBus(str(address))
        seen: list[str] = []
        fail = [True]

        def handler(e: Event) -> None:
            seen.append(e.event_id)
            if fail.pop() if fail else False:
                raise RuntimeError("once")

        leave = remote.subscribe(Topic.EPOCH, handler, name="me")
        assert wait_until(subscribed(local, "me"))
        bus.publish(event(1))
        assert bus.flush(5)
        remote.publish(event(2, Topic.ROLLBACK))
        remote.publish(event(3))
        assert wait_until(lambda: len(seen) == 3), seen
        assert seen == ["ev-1", "ev-1", "ev-3"], "a failed handler gets the event again"
        leave()
        local.publish(event(4))
        remote.subscribe(Topic.EPOCH, handler, name="me")
        assert wait_until(lambda: "ev-4" in seen), "kept for who comes back"
        remote.close()
    bus.close()


def test_an_event_that_was_not_acknowledged_survives_its_connection(
    local: LocalLibrary, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(local, address):
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
        remote.subscribe(None, cut_on_the_first, name="me")
        assert wait_until(subscribed(local, "me"))
        local.publish(event(1))
        local.publish(event(2))
        assert wait_until(lambda: len(seen) == 3), seen
        assert seen == ["ev-1", "ev-1", "ev-2"]
        remote.close()


def test_nobody_speaks_for_the_library_or_breaks_a_contract(
    local: LocalLibrary, remote: RemoteLibrary
) -> None:
    kernel = announce(Topic.KERNEL_READY, KERNEL, sender="test", trace_id="tr-1")
    with pytest.raises(ContractError, match="is what the library says itself"):
        remote.publish(kernel)
    local.subscribe("me", frozenset())
    broken = to_wire(event(1))
    broken.field_report.site = "a"
    with pytest.raises(ContractError, match="not its own"):
        remote._ask("Publish", events_pb2.PublishRequest(event=broken))
    assert local.next_event("me") is None


# Processes of their own: a subscriber that is killed in the middle of its work, and the server.

SUBSCRIBER = """
import os, signal, sys
from esper.rpc.remote_bus import RemoteBus

address, log, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
for event in RemoteBus(address).events(None, name="watcher"):
    if event.topic == "system.capacity.updates":  # a server says it when it starts
        continue
    with open(log, "a") as out:
        out.write(event.model_dump_json() + "\\n")
    seen += 1
    if seen == die_at:  # the work is done, and nobody was told
        os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def served(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and "serving" in process.stdout.readline()


def test_killed_subscriber_and_killed_server_lose_nothing(tmp_path: Path) -> None:
    """The five facts of the pipeline and a run, in the order they became true."""
    folder, log = tmp_path / "library", tmp_path / "log"
    address = f"unix:{tmp_path}/s"
    serve = ("-m", "esper.cli.main", "serve", "--library", str(folder), "--listen", address)
    library = LocalLibrary(folder)

    def logged() -> list[Event]:
        text = log.read_text() if log.exists() else ""
        return [Event.model_validate_json(line) for line in text.splitlines()]

    with running(*serve) as server:
        served(server)
        with running("-c", SUBSCRIBER, address, str(log), "2") as watcher:
            assert wait_until(subscribed(library, "watcher"), 60)
            remote = RemoteLibrary(address, cache=tmp_path / "cache")
            submitted = remote.submit(blueprint(), SIG, author="karn")
            claim = remote.claim_blueprint("forge", 600)
            assert claim is not None
            ready = remote.complete_blueprint(claim, artifact(blueprint()))
            health = SeedHealth(run_id="r", trace_id="tr-1", site="a", kernel_id=ready.kernel_id,
                                state=SeedState.TRAINING, epoch=3, step=30, alpha=0.0,
                                grad_norm=0.5)
            remote.publish(announce(Topic.SEED_HEALTH, health, sender="kasmina",
                                    trace_id="tr-1"))
            assert watcher.wait(60) == -signal.SIGKILL
            remote.close()
        server.kill()
        server.wait()
    # Nobody serves, and workers that share the folder go on.
    work = library.claim_kernel("bench", 600)
    assert work is not None
    known = library.complete_kernel(work, report(ready.kernel_id, "fast"))
    field = FieldReport(run_id="r", trace_id="tr-1", site="a", kernel_id=ready.kernel_id,
                        blueprint_id=blueprint().id, outcome=SeedState.FOSSILIZED,
                        reason="it pays", gain=0.5, epochs=4)
    library.add_report(field)
    library.add_report(field)  # sent twice, true once
    expected = [(Topic.BLUEPRINT_SUBMITTED, submitted), (Topic.KERNEL_READY, ready),
                (Topic.SEED_HEALTH, health), (Topic.KERNEL_CHARACTERIZED, known),
                (Topic.FIELD_REPORTS, field)]
    with running(*serve) as server, running("-c", SUBSCRIBER, address, str(log), "0"):
        served(server)
        assert wait_until(lambda: len(logged()) >= 6, 60), logged()
        assert wait_until(lambda: library.next_event("watcher") is None, 30)
    events = logged()
    ids = [e.event_id for e in events]
    assert ids[1] == ids[2], "what was not acknowledged comes again"
    once = list(dict.fromkeys(ids))
    assert len(ids) == 6 and len(once) == 5
    told = {e.event_id: e for e in events}
    assert [(told[i].topic, payload_of(told[i])) for i in once] == expected
    trace = pipeline_trace(blueprint().id, SIG.id)
    assert [told[i].trace_id for i in once] == [trace, trace, "tr-1", trace, "tr-1"]
    with library._store.read() as con:
        assert con.execute("SELECT count(*) FROM outbox").fetchone()[0] == 0
    assert json.loads(log.read_text().splitlines()[0])["body"]["author"] == "karn"
