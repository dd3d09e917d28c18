"""Artifacts on their way: cut off, too large, falsified; and messages beyond their cap."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from esper.errors import (
    ArtifactCorrupt,
    ContractError,
)
from esper.leyline.proto.v1 import library_pb2 as pb
from esper.leyline.proto.wire import to_wire
from esper.rpc import channel, library_service
from esper.rpc.client import RemoteLibrary
from esper.urza.library import LocalLibrary
from tests.rpc.support import claimed, files, wait_until
from tests.urza.support import artifact


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
        cut.wait(60)

    call = remote._stub.CompleteBlueprint.future(half(), timeout=30)
    assert sent.wait(60)
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
    large = pb.GetKernelRequest(kernel_id="x" * (channel.MAX_REQUEST_BYTES + 1))
    with grpc.insecure_channel(str(remote.address)) as plain:  # one without a cap of its own
        call = plain.unary_unary("/esper.v1.LibraryService/GetKernel",
                                 request_serializer=pb.GetKernelRequest.SerializeToString)
        # Compressed it is a thousandth of its size on the wire.
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                call(large, timeout=60, compression=compression)
    assert remote.capacity() == 1.0
