"""What can go wrong between a client and a server: cut connections, lies, waits, restarts."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from esper.errors import (
    ArtifactCorrupt,
    ContractError,
    EsperError,
    LibraryError,
    Unreachable,
)
from esper.leyline.command import FieldReport
from esper.leyline.events import Event, Topic
from esper.leyline.library import BlueprintClaim, Change
from esper.leyline.lifecycle import BlueprintStatus, SeedState
from esper.leyline.proto.v1 import library_pb2 as pb
from esper.leyline.proto.v1.library_pb2_grpc import LibraryServiceStub
from esper.leyline.proto.wire import to_wire
from esper.oona.bus import Bus
from esper.rpc import channel, event_service, library_service
from esper.rpc.address import Address, parse_address
from esper.rpc.client import RemoteLibrary
from esper.rpc.remote_bus import RemoteBus
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, artifact, blueprint, in_child, report


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return parse_address(f"unix:{tmp_path}/urza.sock")


@pytest.fixture
def local(tmp_path: Path) -> LocalLibrary:
    return LocalLibrary(tmp_path / "library")


@pytest.fixture
def server(local: LocalLibrary, address: Address) -> Iterator[Server]:
    with Server(local, address) as started:
        yield started


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Iterator[RemoteLibrary]:
    library = RemoteLibrary(str(server.address), cache=tmp_path / "cache")
    yield library
    library.close()


def claimed(library: RemoteLibrary) -> BlueprintClaim:
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("forge", 60)
    assert claim is not None
    return claim


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


# Artifacts on their way


def test_an_interrupted_upload_leaves_nothing_and_the_claim_holds(
    remote: RemoteLibrary, local: LocalLibrary
) -> None:
    claim = claimed(remote)
    begin = pb.CompleteBlueprintRequest(
        begin=pb.UploadBegin(claim=to_wire(claim), size=3 << 20))
    chunk = pb.CompleteBlueprintRequest(chunk=bytes(1 << 20))
    sent, cut = threading.Event(), threading.Event()

    def half() -> Iterator[Any]:
        yield begin
        yield chunk
        sent.set()
        cut.wait(10)

    call = remote._stub.CompleteBlueprint.future(half(), timeout=30)
    assert sent.wait(10)
    time.sleep(0.1)
    call.cancel()
    cut.set()
    assert wait_until(lambda: remote.depths().urza_storage == 0)
    assert files(local.root / "blobs") == [] and local.kernels() == []
    kernel = remote.complete_blueprint(claim, artifact(claim.record.ir))
    assert [p.name for p in files(local.root / "blobs")] == [kernel.digest]


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (lambda c: [("end", pb.UploadEnd(sha256="0" * 64))], ContractError),
        (lambda c: [("begin", pb.UploadBegin(claim=c, size=1 << 40))], ArtifactCorrupt),
        (lambda c: [("begin", pb.UploadBegin(claim=c, size=2)), ("chunk", b"xyz")],
         ArtifactCorrupt),
        (lambda c: [("begin", pb.UploadBegin(claim=c, size=3)), ("chunk", b"xyz"),
                    ("end", pb.UploadEnd(sha256="0" * 64))], ArtifactCorrupt),
        (lambda c: [("begin", pb.UploadBegin(claim=c, size=3)), ("chunk", b"xy")],
         ArtifactCorrupt),
        (lambda c: [("begin", pb.UploadBegin(claim=c, size=3)),
                    ("begin", pb.UploadBegin(claim=c, size=3))], ContractError),
        (lambda c: [], ContractError),
    ],
    ids=["no begin", "too large", "more than said", "other digest", "no end", "twice", "nothing"],
)
def test_a_false_upload_is_refused(
    remote: RemoteLibrary, local: LocalLibrary, parts: Any, error: type[Exception]
) -> None:
    claim = claimed(remote)
    requests = [pb.CompleteBlueprintRequest(**{k: v}) for k, v in parts(to_wire(claim))]
    with pytest.raises(error):
        remote._ask("CompleteBlueprint", iter(requests))
    assert files(local.root / "blobs") == []
    remote.heartbeat(claim, 60)


def test_a_wrong_digest_is_refused_on_either_side(
    remote: RemoteLibrary, local: LocalLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(remote)
    kernel = remote.complete_blueprint(claim, artifact(claim.record.ir))
    blob = local.fetch(kernel.digest)
    blob.chmod(0o644)
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + b"?")
    with pytest.raises(ArtifactCorrupt, match="disk is failing"):  # the server says so
        remote.fetch(kernel.digest)
    monkeypatch.setattr(library_service, "hashlib", SimpleNamespace(sha256=_Blind))
    with pytest.raises(ArtifactCorrupt, match="nothing was kept"):  # it does not, the client does
        remote.fetch(kernel.digest)
    monkeypatch.undo()
    assert files(tmp_path / "cache") == []
    blob.write_bytes(good)
    cached = remote.fetch(kernel.digest)
    assert cached.read_bytes() == good and stat.S_IMODE(cached.stat().st_mode) == 0o444
    # What rots in the cache is fetched again.
    cached.chmod(0o644)
    cached.write_bytes(b"rotten")
    assert remote.fetch(kernel.digest).read_bytes() == good


class _Blind:
    """A hash that always finds what was asked for: the server of a liar."""

    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> Any:
        class Anything(str):
            def __ne__(self, other: object) -> bool:
                return False

        return Anything()


def test_a_message_too_large_is_refused_before_it_is_parsed(remote: RemoteLibrary) -> None:
    large = "x" * (channel.MAX_REQUEST_BYTES + 1)
    with grpc.insecure_channel(str(remote.address)) as plain:  # one without a cap of its own
        call = plain.unary_unary("/esper.v1.LibraryService/GetKernel",
                                 request_serializer=pb.GetKernelRequest.SerializeToString)
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            call(pb.GetKernelRequest(kernel_id=large), timeout=10)
    assert remote.capacity() == 1.0


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

    remote._stub = LibraryServiceStub(grpc.intercept_channel(remote._channel, Deadlines()))
    remote.submit(blueprint(2), SIG, author="karn")
    for name, arguments in calls.items():
        with suppress(EsperError):
            answer = getattr(remote, name)(*arguments)
            if name == "watch":
                remote.submit(blueprint(3), SIG, author="karn")
                next(answer)
                answer.close()
    service = pb.DESCRIPTOR.services_by_name["LibraryService"]
    assert set(seen) == {m.name for m in service.methods}
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


def test_a_recompilation_is_handed_out(remote: RemoteLibrary) -> None:
    claim = claimed(remote)
    remote.complete_blueprint(claim, artifact(claim.record.ir))
    again = remote.claim_recompilation(claim.record.blueprint_id, SIG, "forge", 60)
    assert again is not None
    assert remote.claim_recompilation(claim.record.blueprint_id, SIG, "other", 60) is None
    remote.reject_blueprint(again, "the compiler crashed")
    assert remote.blueprints()[0].status is BlueprintStatus.COMPILED


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
    thread.join(10)
    assert codes == [0] * 5 and not failures and not thread.is_alive()
    assert remote.capacity() == 1.0


# Events


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
