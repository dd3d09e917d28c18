"""A library behind a server: `KeptLibrary` over gRPC."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc

from esper.errors import AccessDenied, EsperError, LibraryError, Unreachable
from esper.leyline.artifact import Pipeline, Runtime
from esper.leyline.base import Contract
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.command import FieldReport
from esper.leyline.events import Event, Priority
from esper.leyline.library import (
    BlueprintClaim,
    BlueprintRecord,
    Change,
    KernelClaim,
    KernelRecord,
    Lease,
    QueueDepths,
)
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.proto.v1 import events_pb2
from esper.leyline.proto.v1 import library_pb2 as pb
from esper.leyline.proto.v1.events_pb2_grpc import EventServiceStub
from esper.leyline.proto.v1.library_pb2_grpc import LibraryServiceStub
from esper.leyline.proto.wire import enum_to_wire, to_contract, to_wire
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.rpc.address import Access, parse_address
from esper.rpc.channel import (
    CALL_SECONDS,
    CHUNK_BYTES,
    LIST_SECONDS,
    STREAM_SECONDS,
    TRANSFER_SECONDS,
    connect,
)
from esper.rpc.failures import error_of
from esper.urza.blobs import BlobFolder

T = TypeVar("T", bound=Contract)
Claim = BlueprintClaim | KernelClaim


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "esper" / "artifacts"


class RemoteLibrary:
    """The library that an `esper serve` offers. See `Library` for the contract of its methods.

    Nothing is connected before it is used. A call waits for a server that is away, for as long
    as its deadline allows, so that a restart is a pause and no failure. Safe to call from
    several threads; after a fork the child must open its own.

    Args:
        address: "unix:/path/to.sock" or "host:port".
        access: the token and authorities for host:port.
        cache: folder in which fetched artifacts are kept, by digest; it may be emptied at any
            time. By default `esper/artifacts` in the user's cache.
        on_denied: called with each AccessDenied before it is raised: a service that tries
            again after every error can be ended by it.

    Every method raises besides:
        Unreachable: the server did not answer within the deadline.
        AccessDenied: the token is not known, or not of a role that the call needs.
    """

    def __init__(
        self,
        address: str,
        access: Access | None = None,
        *,
        cache: Path | None = None,
        on_denied: Callable[[AccessDenied], None] = lambda error: None,
    ) -> None:
        self.address = parse_address(address)
        self._channel = connect(self.address, access or Access())
        self._stub = LibraryServiceStub(self._channel)
        self._events = EventServiceStub(self._channel)
        self._pid, self.on_denied = os.getpid(), on_denied
        folder = cache or _default_cache()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise LibraryError(
                f"cannot keep artifacts in {folder}: {e}; set XDG_CACHE_HOME to a folder that you "
                "may write to"
            ) from e
        self._cache = BlobFolder(folder)

    def check(self) -> None:
        """Ask the server something, without waiting for it to come up.

        Raises:
            Unreachable, AccessDenied: says what is wrong with the connection.
        """
        self._ask("GetCapacity", pb.GetCapacityRequest(), wait=False)

    def close(self) -> None:
        self._channel.close()

    # Calls

    def _method(self, name: str) -> Callable[..., Any]:
        if self._pid != os.getpid():
            raise LibraryError(
                f"the connection to {self.address} belongs to process {self._pid}, which this one "
                "was forked from; open the library again here"
            )
        stub = self._events if name == "Publish" else self._stub
        method: Callable[..., Any] = getattr(stub, name)
        return method

    def _error(self, call: grpc.RpcError) -> EsperError:
        error = error_of(call, self.address)
        if isinstance(error, AccessDenied):
            self.on_denied(error)
        return error

    def _ask(
        self, name: str, request: Any, seconds: float = CALL_SECONDS, wait: bool = True
    ) -> Any:
        try:
            return self._method(name)(request, timeout=seconds, wait_for_ready=wait)
        except grpc.RpcError as e:
            raise self._error(e) from e

    def _stream(
        self, name: str, request: Any, seconds: float = LIST_SECONDS, wait: bool = True
    ) -> Iterator[Any]:
        """The messages of an answer; leaving the iterator early ends the call."""
        call = self._method(name)(request, timeout=seconds, wait_for_ready=wait)
        try:
            yield from call
        except grpc.RpcError as e:
            raise self._error(e) from e
        finally:
            call.cancel()

    def _list(self, contract: type[T], name: str, request: Any) -> list[T]:
        return [to_contract(contract, m) for m in self._stream(name, request)]

    # Signatures and submissions

    def register_signature(self, signature: SiteSignature) -> None:
        self._ask("RegisterSignature", pb.RegisterSignatureRequest(signature=to_wire(signature)))

    def signatures(self) -> list[SiteSignature]:
        return self._list(SiteSignature, "ListSignatures", pb.ListSignaturesRequest())

    def submit(
        self,
        ir: BlueprintIR,
        signature: SiteSignature,
        *,
        author: str,
        interest: float = 0.5,
        priority: Priority = Priority.NORMAL,
        parents: tuple[str, ...] = (),
        pipeline: Pipeline | None = None,
    ) -> BlueprintRecord:
        request = pb.SubmitRequest(
            ir=to_wire(ir), signature=to_wire(signature), author=author, interest=interest,
            priority=enum_to_wire(priority), parents=parents,
            pipeline=None if pipeline is None else enum_to_wire(pipeline),
        )
        return to_contract(BlueprintRecord, self._ask("Submit", request).record)

    # Work under a lease

    def claim_blueprint(
        self, worker: str, lease_seconds: float, leave: Collection[tuple[str, str]] = ()
    ) -> BlueprintClaim | None:
        left = [pb.BlueprintKey(blueprint_id=b, signature_id=s) for b, s in leave]
        request = pb.ClaimBlueprintRequest(
            worker=worker, lease_ms=lease_seconds * 1e3, leave=left
        )
        return _claimed(BlueprintClaim, self._ask("ClaimBlueprint", request))

    def claim_recompilation(
        self,
        blueprint_id: str,
        signature: SiteSignature,
        worker: str,
        lease_seconds: float,
        pipeline: Pipeline | None = None,
    ) -> BlueprintClaim | None:
        request = pb.ClaimRecompilationRequest(
            blueprint_id=blueprint_id, signature=to_wire(signature), worker=worker,
            lease_ms=lease_seconds * 1e3,
            pipeline=None if pipeline is None else enum_to_wire(pipeline),
        )
        return _claimed(BlueprintClaim, self._ask("ClaimRecompilation", request))

    def complete_blueprint(self, claim: BlueprintClaim, artifact: bytes) -> KernelRecord:
        self.capacity()  # waits for a server that is away no longer than any other call does
        answer = self._ask(
            "CompleteBlueprint", _upload(claim, artifact), TRANSFER_SECONDS, wait=False
        )
        return to_contract(KernelRecord, answer.record)

    def reject_blueprint(self, claim: BlueprintClaim, reason: str) -> None:
        self._ask("RejectBlueprint", pb.RejectBlueprintRequest(claim=to_wire(claim), reason=reason))

    def claim_kernel(
        self, worker: str, lease_seconds: float, runtime: Runtime | None = None
    ) -> KernelClaim | None:
        request = pb.ClaimKernelRequest(
            worker=worker, lease_ms=lease_seconds * 1e3,
            runtime=None if runtime is None else to_wire(runtime),
        )
        return _claimed(KernelClaim, self._ask("ClaimKernel", request))

    def complete_kernel(self, claim: KernelClaim, report: ValidationReport) -> KernelRecord:
        request = pb.CompleteKernelRequest(claim=to_wire(claim), report=to_wire(report))
        return to_contract(KernelRecord, self._ask("CompleteKernel", request).record)

    def heartbeat(self, claim: Claim, lease_seconds: float) -> float:
        request = pb.HeartbeatRequest(lease_ms=lease_seconds * 1e3, **_named(claim))
        return float(self._ask("Heartbeat", request).expires)

    def release(self, claim: Claim) -> None:
        self._ask("Release", pb.ReleaseRequest(**_named(claim)))

    # Questions

    def blueprints(self, signature: SiteSignature | None = None) -> list[BlueprintRecord]:
        request = pb.ListBlueprintsRequest(
            signature=None if signature is None else to_wire(signature)
        )
        return self._list(BlueprintRecord, "ListBlueprints", request)

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        status: KernelStatus | None = None,
        tags: Iterable[str] = (),
    ) -> list[KernelRecord]:
        request = pb.ListKernelsRequest(
            signature=None if signature is None else to_wire(signature),
            status=None if status is None else enum_to_wire(status), tags=tags,
        )
        return self._list(KernelRecord, "ListKernels", request)

    def kernel(self, kernel_id: str) -> KernelRecord:
        answer = self._ask("GetKernel", pb.GetKernelRequest(kernel_id=kernel_id))
        return to_contract(KernelRecord, answer.record)

    def fetch(self, digest: str) -> Path:
        """See `Library`. The file lies in the cache, where it is hashed again each time."""
        if self._cache.holds(digest):
            return self._cache.path(digest)
        self.capacity()  # see complete_blueprint
        answers = self._stream(
            "FetchArtifact", pb.FetchArtifactRequest(digest=digest), TRANSFER_SECONDS, wait=False
        )
        return self._cache.take(digest, (answer.chunk for answer in answers))

    def depths(self) -> QueueDepths:
        return to_contract(QueueDepths, self._ask("GetDepths", pb.GetDepthsRequest()).depths)

    def capacity(self) -> float:
        return float(self._ask("GetCapacity", pb.GetCapacityRequest()).factor)

    def leases(self) -> list[Lease]:
        return self._list(Lease, "ListLeases", pb.ListLeasesRequest())

    def changes(self, after: int | None = None, limit: int = 1000) -> list[Change]:
        return self._list(Change, "ListChanges", pb.ListChangesRequest(after=after, limit=limit))

    def watch(self, after: int | None = None) -> Generator[Change, None, None]:
        """Changes as they happen, for ever: those after `after`, by default from now on.

        A server that went away is waited for, and no change is missed or repeated. The
        iterator raises Unreachable where it was away for longer than a call's deadline.
        """
        if after is None:
            newest = self.changes(limit=1)
            after = newest[-1].sequence if newest else 0
        return self._watch(after)

    def _watch(self, after: int) -> Generator[Change, None, None]:
        while True:
            self.capacity()  # waits for the server, and says so where it does not come back
            with suppress(Unreachable):
                for message in self._stream("Watch", pb.WatchRequest(after=after), STREAM_SECONDS):
                    change = to_contract(Change, message)
                    yield change
                    after = change.sequence

    # From the field

    def quarantine(self, kernel_id: str, reason: str) -> None:
        self._ask("Quarantine", pb.QuarantineRequest(kernel_id=kernel_id, reason=reason))

    def add_report(self, report: FieldReport) -> None:
        self._ask("AddReport", pb.AddReportRequest(report=to_wire(report)))

    def reports(self) -> list[FieldReport]:
        return self._list(FieldReport, "ListReports", pb.ListReportsRequest())

    # Events

    def publish(self, event: Event) -> None:
        """See `Publishing`. Waits for the server: this is not for the training thread."""
        self._ask("Publish", events_pb2.PublishRequest(event=to_wire(event)))

    # Curation

    def archive(self, blueprint_id: str, signature: SiteSignature, reason: str) -> None:
        self._ask("Archive", pb.ArchiveRequest(
            blueprint_id=blueprint_id, signature=to_wire(signature), reason=reason
        ))

    def retire(self, kernel_id: str, reason: str) -> None:
        self._ask("Retire", pb.RetireRequest(kernel_id=kernel_id, reason=reason))


def _claimed(contract: type[T], answer: Any) -> T | None:
    return to_contract(contract, answer.claim) if answer.HasField("claim") else None


def _named(claim: Claim) -> dict[str, Any]:
    kind = "blueprint" if isinstance(claim, BlueprintClaim) else "kernel"
    return {kind: to_wire(claim)}


def _upload(claim: BlueprintClaim, artifact: bytes) -> Iterator[Any]:
    hashed, view = hashlib.sha256(), memoryview(artifact)
    yield pb.CompleteBlueprintRequest(
        begin=pb.UploadBegin(claim=to_wire(claim), size=len(artifact))
    )
    for start in range(0, len(artifact), CHUNK_BYTES):
        chunk = bytes(view[start:start + CHUNK_BYTES])
        hashed.update(chunk)
        yield pb.CompleteBlueprintRequest(chunk=chunk)
    yield pb.CompleteBlueprintRequest(end=pb.UploadEnd(sha256=hashed.hexdigest()))
