"""`LibraryService` over any library: what a call asks is asked of the library, no more."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from esper.errors import ArtifactCorrupt, ContractError, QueueFull
from esper.leyline.artifact import Pipeline, Runtime
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.command import FieldReport
from esper.leyline.events import Priority
from esper.leyline.library import BlueprintClaim, KeptLibrary, KernelClaim
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.proto.v1 import library_pb2 as pb
from esper.leyline.proto.v1 import library_pb2_grpc
from esper.leyline.proto.wire import enum_to_contract, to_contract, to_wire
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.rpc.answering import Streams, answers
from esper.rpc.channel import CHUNK_BYTES
from esper.urza.blobs import MAX_BLOB_BYTES

WATCH_SECONDS = 0.2  # between looks; another process may write the same library
MAX_UPLOADS = 4  # at a time, for each is held in memory until it is whole
UPLOAD_WAIT_SECONDS = 5.0  # for one of them; the thread that waits is not there for heartbeats
MAX_CHANGES = 10_000  # per answer
MAX_LEFT = 1000  # blueprints that one claim leaves to others


def _pipeline(request: Any) -> Pipeline | None:
    if not request.HasField("pipeline"):
        return None
    return enum_to_contract(Pipeline, request.pipeline)


def _signature(request: Any) -> SiteSignature | None:
    if not request.HasField("signature"):
        return None
    return to_contract(SiteSignature, request.signature)


def _claim(request: Any) -> BlueprintClaim | KernelClaim:
    match request.WhichOneof("claim"):
        case "blueprint":
            return to_contract(BlueprintClaim, request.blueprint)
        case "kernel":
            return to_contract(KernelClaim, request.kernel)
    raise ContractError("the request names no claim; expected that of a blueprint or a kernel")


class LibraryServicer(library_pb2_grpc.LibraryServiceServicer):
    """Stateless but for its counts; safe on any number of threads, as the library is."""

    def __init__(self, library: KeptLibrary, streams: Streams) -> None:
        self._library, self._streams = library, streams
        self._uploads = threading.BoundedSemaphore(MAX_UPLOADS)

    # Signatures and submissions

    @answers
    def RegisterSignature(self, request: Any, context: Any) -> Any:
        self._library.register_signature(to_contract(SiteSignature, request.signature))
        return pb.RegisterSignatureResponse()

    @answers
    def ListSignatures(self, request: Any, context: Any) -> Iterator[Any]:
        yield from map(to_wire, self._library.signatures())

    @answers
    def Submit(self, request: Any, context: Any) -> Any:
        record = self._library.submit(
            to_contract(BlueprintIR, request.ir),
            to_contract(SiteSignature, request.signature),
            author=request.author,
            interest=request.interest,
            priority=enum_to_contract(Priority, request.priority),
            parents=tuple(request.parents),
            pipeline=_pipeline(request),
        )
        return pb.SubmitResponse(record=to_wire(record))

    # Work under a lease

    @answers
    def ClaimBlueprint(self, request: Any, context: Any) -> Any:
        if len(request.leave) > MAX_LEFT:
            raise ContractError(
                f"a claim leaves at most {MAX_LEFT} blueprints to others, given "
                f"{len(request.leave)}"
            )
        leave = [(key.blueprint_id, key.signature_id) for key in request.leave]
        claim = self._library.claim_blueprint(request.worker, request.lease_ms / 1e3, leave)
        return pb.ClaimBlueprintResponse(claim=None if claim is None else to_wire(claim))

    @answers
    def ClaimRecompilation(self, request: Any, context: Any) -> Any:
        claim = self._library.claim_recompilation(
            request.blueprint_id, to_contract(SiteSignature, request.signature), request.worker,
            request.lease_ms / 1e3, _pipeline(request),
        )
        return pb.ClaimBlueprintResponse(claim=None if claim is None else to_wire(claim))

    @answers
    def CompleteBlueprint(self, request: Any, context: Any) -> Any:
        if not self._uploads.acquire(timeout=UPLOAD_WAIT_SECONDS):
            raise QueueFull(f"{MAX_UPLOADS} artifacts are being uploaded; try again soon")
        try:
            claim, artifact = _received(request)
            record = self._library.complete_blueprint(claim, artifact)
        finally:
            self._uploads.release()
        return pb.CompleteBlueprintResponse(record=to_wire(record))

    @answers
    def RejectBlueprint(self, request: Any, context: Any) -> Any:
        self._library.reject_blueprint(to_contract(BlueprintClaim, request.claim), request.reason)
        return pb.RejectBlueprintResponse()

    @answers
    def ClaimKernel(self, request: Any, context: Any) -> Any:
        runtime = None
        if request.HasField("runtime"):
            runtime = to_contract(Runtime, request.runtime)
        claim = self._library.claim_kernel(request.worker, request.lease_ms / 1e3, runtime)
        return pb.ClaimKernelResponse(claim=None if claim is None else to_wire(claim))

    @answers
    def CompleteKernel(self, request: Any, context: Any) -> Any:
        record = self._library.complete_kernel(
            to_contract(KernelClaim, request.claim), to_contract(ValidationReport, request.report)
        )
        return pb.CompleteKernelResponse(record=to_wire(record))

    @answers
    def Heartbeat(self, request: Any, context: Any) -> Any:
        expires = self._library.heartbeat(_claim(request), request.lease_ms / 1e3)
        return pb.HeartbeatResponse(expires=expires)

    @answers
    def Release(self, request: Any, context: Any) -> Any:
        self._library.release(_claim(request))
        return pb.ReleaseResponse()

    # Questions

    @answers
    def ListBlueprints(self, request: Any, context: Any) -> Iterator[Any]:
        yield from map(to_wire, self._library.blueprints(_signature(request)))

    @answers
    def ListKernels(self, request: Any, context: Any) -> Iterator[Any]:
        status = None
        if request.HasField("status"):
            status = enum_to_contract(KernelStatus, request.status)
        yield from map(to_wire, self._library.kernels(
            signature=_signature(request), status=status, tags=tuple(request.tags)
        ))

    @answers
    def GetKernel(self, request: Any, context: Any) -> Any:
        return pb.GetKernelResponse(record=to_wire(self._library.kernel(request.kernel_id)))

    @answers
    def FetchArtifact(self, request: Any, context: Any) -> Iterator[Any]:
        hashed = hashlib.sha256()
        with open(self._library.fetch(request.digest), "rb") as file:
            size: int | None = file.seek(0, 2)
            file.seek(0)
            while chunk := file.read(CHUNK_BYTES):
                hashed.update(chunk)
                yield pb.FetchArtifactResponse(chunk=chunk, size=size)
                size = None
        if hashed.hexdigest() != request.digest:
            raise ArtifactCorrupt(
                f"the library's file of {request.digest} has digest {hashed.hexdigest()} by now: "
                "its disk is failing; compile the kernel again"
            )

    @answers
    def GetDepths(self, request: Any, context: Any) -> Any:
        return pb.GetDepthsResponse(depths=to_wire(self._library.depths()))

    @answers
    def GetCapacity(self, request: Any, context: Any) -> Any:
        return pb.GetCapacityResponse(factor=self._library.capacity())

    @answers
    def ListLeases(self, request: Any, context: Any) -> Iterator[Any]:
        yield from map(to_wire, self._library.leases())

    @answers
    def ListChanges(self, request: Any, context: Any) -> Iterator[Any]:
        after = request.after if request.HasField("after") else None
        limit = min(request.limit, MAX_CHANGES)
        yield from map(to_wire, self._library.changes(after, limit))

    @answers
    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        with self._streams.one():
            if request.HasField("after"):
                after = request.after
            else:
                after = max((c.sequence for c in self._library.changes(limit=1)), default=0)
            while context.is_active() and not self._streams.stopping.is_set():
                for change in (found := self._library.changes(after)):
                    yield to_wire(change)
                    after = change.sequence
                if not found:
                    self._streams.stopping.wait(WATCH_SECONDS)

    # From the field

    @answers
    def Quarantine(self, request: Any, context: Any) -> Any:
        self._library.quarantine(request.kernel_id, request.reason)
        return pb.QuarantineResponse()

    @answers
    def AddReport(self, request: Any, context: Any) -> Any:
        self._library.add_report(to_contract(FieldReport, request.report))
        return pb.AddReportResponse()

    @answers
    def ListReports(self, request: Any, context: Any) -> Iterator[Any]:
        yield from map(to_wire, self._library.reports())

    # Curation

    @answers
    def Archive(self, request: Any, context: Any) -> Any:
        self._library.archive(
            request.blueprint_id, to_contract(SiteSignature, request.signature), request.reason
        )
        return pb.ArchiveResponse()

    @answers
    def Retire(self, request: Any, context: Any) -> Any:
        self._library.retire(request.kernel_id, request.reason)
        return pb.RetireResponse()


def _received(parts: Iterator[Any]) -> tuple[BlueprintClaim, bytes]:
    """A whole upload, hashed as it came in. Memory is all that it ever takes.

    Raises:
        ArtifactCorrupt: too large, of another size or digest than announced, or cut off.
        ContractError: the parts are not in order.
    """
    first = next(parts, None)
    if first is None or first.WhichOneof("part") != "begin":
        raise ContractError("an upload begins with `begin`")
    claim, size = to_contract(BlueprintClaim, first.begin.claim), first.begin.size
    if size > MAX_BLOB_BYTES:
        raise ArtifactCorrupt(
            f"an artifact of {size} bytes was announced, one has at most {MAX_BLOB_BYTES}"
        )
    hashed, chunks, arrived = hashlib.sha256(), list[bytes](), 0
    for part in parts:
        match part.WhichOneof("part"):
            case "chunk":
                arrived += len(part.chunk)
                if arrived > size:
                    raise ArtifactCorrupt(f"more than the {size} bytes announced arrived")
                hashed.update(part.chunk)
                chunks.append(part.chunk)
            case "end":
                if arrived != size or hashed.hexdigest() != part.end.sha256:
                    raise ArtifactCorrupt(
                        f"{arrived} bytes with digest {hashed.hexdigest()} arrived, {size} bytes "
                        f"with {part.end.sha256} were sent; nothing was kept, send them again"
                    )
                return claim, b"".join(chunks)
            case _:
                raise ContractError("after `begin`, an upload is `chunk`s and one `end`")
    raise ArtifactCorrupt(f"the upload ended after {arrived} of {size} bytes; nothing was kept")
