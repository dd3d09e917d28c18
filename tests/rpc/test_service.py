"""A client's life with its server: deadlines, restarts, watching, forks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from esper.errors import (
    EsperError,
    LibraryError,
    NotInLibrary,
    Unreachable,
)
from esper.leyline.command import FieldReport
from esper.leyline.events import Event, Topic
from esper.leyline.library import Change
from esper.leyline.lifecycle import BlueprintStatus, SeedState
from esper.leyline.proto.v1 import library_pb2 as pb
from esper.leyline.proto.v1.events_pb2_grpc import EventServiceStub
from esper.leyline.proto.v1.library_pb2_grpc import LibraryServiceStub
from esper.rpc import channel
from esper.rpc.address import Address
from esper.rpc.client import RemoteLibrary
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.rpc.support import claimed, wait_until
from tests.urza.support import SIG, artifact, blueprint, in_child, report

# Time


def test_a_call_ends_with_its_deadline(
    remote: RemoteLibrary, local: LocalLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(local, "kernel", lambda kernel_id: release.wait(5))
    start = time.monotonic()
    with pytest.raises(Unreachable, match="DEADLINE_EXCEEDED"):
        remote._ask("GetKernel", pb.GetKernelRequest(kernel_id="k"), 0.3)
    assert time.monotonic() - start < 3
    release.set()


def test_every_call_has_a_deadline(
    remote: RemoteLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(remote)
    kernel = remote.complete_blueprint(claim, artifact(claim.record.ir))
    work = remote.claim_kernel("bench", 60)
    assert work is not None
    field_report = FieldReport(run_id="r", trace_id="t", site="s", kernel_id="k",
                               blueprint_id="b", outcome=SeedState.CULLED, reason="", epochs=1)
    calls: dict[str, tuple[Any, ...]] = {
        "register_signature": (SIG,), "signatures": (), "claim_blueprint": ("w", 60),
        "claim_recompilation": (claim.record.blueprint_id, SIG, "w", 60),
        "complete_blueprint": (claim, b"x"), "reject_blueprint": (claim, "why"),
        "claim_kernel": ("w", 60), "complete_kernel": (work, report(kernel.kernel_id)),
        "heartbeat": (work, 60), "release": (work,), "blueprints": (), "kernels": (),
        "kernel": ("k",), "fetch": ("0" * 64,), "depths": (), "capacity": (), "leases": (),
        "changes": (), "watch": (), "quarantine": ("k", "why"), "add_report": (field_report,),
        "reports": (), "archive": ("b", SIG, "why"), "retire": ("k", "why"), "check": (),
        "publish": (Event(topic=Topic.EPOCH, sender="t"),),
    }
    public = {n for n in vars(RemoteLibrary) if not n.startswith("_")}
    assert public == {*calls, "submit", "close"}
    seen: dict[str, float] = {}

    class Deadlines(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
                    grpc.StreamUnaryClientInterceptor):
        def _seen(self, go_on: Any, details: Any, request: Any) -> Any:
            seen[details.method.rpartition("/")[2]] = details.timeout
            return go_on(details, request)

        intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _seen

    watched = grpc.intercept_channel(remote._channel, Deadlines())
    remote._stub, remote._events = LibraryServiceStub(watched), EventServiceStub(watched)
    remote.submit(blueprint(2), SIG, author="karn")
    for name, arguments in calls.items():
        with suppress(EsperError):
            answer = getattr(remote, name)(*arguments)
            if name == "watch":
                remote.submit(blueprint(3), SIG, author="karn")
                next(answer)
                answer.close()
    service = pb.DESCRIPTOR.services_by_name["LibraryService"]
    assert set(seen) == {"Publish", *(m.name for m in service.methods)}
    assert all(0 < seconds <= channel.STREAM_SECONDS for seconds in seen.values()), seen


def test_no_server_is_said_at_once_where_it_is_asked_for(tmp_path: Path) -> None:
    library = RemoteLibrary(f"unix:{tmp_path}/nobody.sock")
    with pytest.raises(Unreachable, match=r"nobody.sock.*esper serve"):
        library.check()


def test_a_restart_is_a_pause(
    local: LocalLibrary, address: Address, tmp_path: Path
) -> None:
    """A client that lived through it, in the middle of its work, notices nothing."""
    library = RemoteLibrary(str(address), cache=tmp_path / "cache")
    first = Server(local, address).start()
    claim = claimed(library)
    seen: list[Change] = []
    watching = library.watch(after=0)
    seen.append(next(watching))
    first.stop(grace=0.1)
    with ThreadPoolExecutor(2) as pool:
        heartbeat = pool.submit(library.heartbeat, claim, 60)
        kernel = pool.submit(library.complete_blueprint, claim, artifact(claim.record.ir))
        time.sleep(0.5)
        assert not heartbeat.done() and not kernel.done()
        with Server(LocalLibrary(local.root), address):
            assert kernel.result(10).blueprint_id == claim.record.blueprint_id
            assert heartbeat.exception(10) is None or "is over" in str(heartbeat.exception())
            while seen[-1].after != BlueprintStatus.COMPILED:
                seen.append(next(watching))
            assert [c.sequence for c in seen] == list(range(1, len(seen) + 1)), "none twice"
            watching.close()
            library.close()


def test_a_server_that_takes_over_keeps_its_socket_when_the_last_one_ends(
    local: LocalLibrary, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, release = threading.Event(), threading.Event()

    def slow(kernel_id: str) -> None:
        asked.set()
        release.wait(60)
        raise NotInLibrary(kernel_id)

    monkeypatch.setattr(local, "kernel", slow)
    first = Server(local, address).start()
    library = RemoteLibrary(str(address), cache=tmp_path / "cache")
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(library.kernel, "k")
        assert asked.wait(60)
        stopping = pool.submit(first.stop, 60)
        assert wait_until(lambda: address.socket is not None and not address.socket.exists())
        with Server(LocalLibrary(local.root), address):
            release.set()
            stopping.result(60)
            assert RemoteLibrary(str(address), cache=tmp_path / "cache").capacity() == 1.0
        assert isinstance(call.exception(60), EsperError)


def test_what_is_repeated_is_what_the_proto_calls_idempotent() -> None:
    repeated = {m["method"] for m in channel.retried()}
    assert {"Submit", "Heartbeat", "GetKernel", "AddReport", "Publish"} <= repeated
    assert not {"ClaimBlueprint", "ClaimKernel", "CompleteBlueprint", "CompleteKernel", "Release",
                "RejectBlueprint", "Archive"} & repeated


# Watching


def test_watch_sees_changes_of_every_process_and_from_where_it_was_told(
    remote: RemoteLibrary, local: LocalLibrary
) -> None:
    local.submit(blueprint(1), SIG, author="karn")
    watching = remote.watch()  # from now on
    other = LocalLibrary(local.root)  # as a worker in the same folder would have it
    other.submit(blueprint(2), SIG, author="karn")
    claim = other.claim_blueprint("forge", 60)
    assert claim is not None
    other.reject_blueprint(claim, "too deep")
    found = [next(watching) for _ in range(3)]
    watching.close()
    assert [(c.before, c.after) for c in found] == [
        (None, "UNVALIDATED"), ("UNVALIDATED", "COMPILING"), ("COMPILING", "INVALID")]
    assert found[-1].reason == "too deep"
    again = remote.watch(after=found[0].sequence)
    assert next(again) == found[1]
    again.close()
    assert [c.sequence for c in remote.changes(after=found[0].sequence)] == [
        c.sequence for c in found[1:]]
    assert remote.changes(limit=1) == found[-1:]


def test_leases_say_who_works_on_what(remote: RemoteLibrary) -> None:
    claim = claimed(remote)
    (lease,) = remote.leases()
    assert (lease.item, lease.worker, lease.expires) == (
        claim.record.blueprint_id, "forge", claim.expires)
    kernel = remote.complete_blueprint(claim, artifact(claim.record.ir))
    work = remote.claim_kernel("bench", 60)
    assert work is not None
    (lease,) = remote.leases()
    assert (lease.item, lease.worker, lease.signature) == (kernel.kernel_id, "bench", SIG)
    remote.complete_kernel(work, report(kernel.kernel_id))
    assert remote.leases() == []


# Processes


def test_a_fork_disturbs_nobody(remote: RemoteLibrary) -> None:
    """A data loader forks in the middle of polling. The child is told; the parent goes on."""
    stop = threading.Event()
    failures: list[Exception] = []

    def poll() -> None:
        while not stop.is_set():
            try:
                remote.depths()
            except Exception as e:
                failures.append(e)

    def child() -> None:
        with pytest.raises(LibraryError, match="forked"):
            remote.depths()

    thread = threading.Thread(target=poll)
    thread.start()
    codes = [in_child(child) for _ in range(5)]
    stop.set()
    thread.join(60)
    assert codes == [0] * 5 and not failures and not thread.is_alive()
    assert remote.capacity() == 1.0
