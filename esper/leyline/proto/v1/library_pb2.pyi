from esper.leyline.proto.v1 import contracts_pb2 as _contracts_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterSignatureRequest(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: _contracts_pb2.SiteSignature
    def __init__(self, signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ...) -> None: ...

class RegisterSignatureResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSignaturesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("ir", "signature", "author", "interest", "priority", "parents", "pipeline")
    IR_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    INTEREST_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    ir: _contracts_pb2.BlueprintIR
    signature: _contracts_pb2.SiteSignature
    author: str
    interest: float
    priority: _contracts_pb2.Priority
    parents: _containers.RepeatedScalarFieldContainer[str]
    pipeline: _contracts_pb2.Pipeline
    def __init__(self, ir: _Optional[_Union[_contracts_pb2.BlueprintIR, _Mapping]] = ..., signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ..., author: _Optional[str] = ..., interest: _Optional[float] = ..., priority: _Optional[_Union[_contracts_pb2.Priority, str]] = ..., parents: _Optional[_Iterable[str]] = ..., pipeline: _Optional[_Union[_contracts_pb2.Pipeline, str]] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _contracts_pb2.BlueprintRecord
    def __init__(self, record: _Optional[_Union[_contracts_pb2.BlueprintRecord, _Mapping]] = ...) -> None: ...

class BlueprintKey(_message.Message):
    __slots__ = ("blueprint_id", "signature_id")
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_ID_FIELD_NUMBER: _ClassVar[int]
    blueprint_id: str
    signature_id: str
    def __init__(self, blueprint_id: _Optional[str] = ..., signature_id: _Optional[str] = ...) -> None: ...

class ClaimBlueprintRequest(_message.Message):
    __slots__ = ("worker", "lease_ms", "leave")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    lease_ms: float
    leave: _containers.RepeatedCompositeFieldContainer[BlueprintKey]
    def __init__(self, worker: _Optional[str] = ..., lease_ms: _Optional[float] = ..., leave: _Optional[_Iterable[_Union[BlueprintKey, _Mapping]]] = ...) -> None: ...

class ClaimRecompilationRequest(_message.Message):
    __slots__ = ("blueprint_id", "signature", "worker", "lease_ms", "pipeline")
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    blueprint_id: str
    signature: _contracts_pb2.SiteSignature
    worker: str
    lease_ms: float
    pipeline: _contracts_pb2.Pipeline
    def __init__(self, blueprint_id: _Optional[str] = ..., signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ..., worker: _Optional[str] = ..., lease_ms: _Optional[float] = ..., pipeline: _Optional[_Union[_contracts_pb2.Pipeline, str]] = ...) -> None: ...

class ClaimBlueprintResponse(_message.Message):
    __slots__ = ("claim",)
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    claim: _contracts_pb2.BlueprintClaim
    def __init__(self, claim: _Optional[_Union[_contracts_pb2.BlueprintClaim, _Mapping]] = ...) -> None: ...

class CompleteBlueprintRequest(_message.Message):
    __slots__ = ("begin", "chunk", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: UploadBegin
    chunk: bytes
    end: UploadEnd
    def __init__(self, begin: _Optional[_Union[UploadBegin, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[UploadEnd, _Mapping]] = ...) -> None: ...

class UploadBegin(_message.Message):
    __slots__ = ("claim", "size")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    claim: _contracts_pb2.BlueprintClaim
    size: int
    def __init__(self, claim: _Optional[_Union[_contracts_pb2.BlueprintClaim, _Mapping]] = ..., size: _Optional[int] = ...) -> None: ...

class UploadEnd(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class CompleteBlueprintResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _contracts_pb2.KernelRecord
    def __init__(self, record: _Optional[_Union[_contracts_pb2.KernelRecord, _Mapping]] = ...) -> None: ...

class RejectBlueprintRequest(_message.Message):
    __slots__ = ("claim", "reason")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    claim: _contracts_pb2.BlueprintClaim
    reason: str
    def __init__(self, claim: _Optional[_Union[_contracts_pb2.BlueprintClaim, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class RejectBlueprintResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClaimKernelRequest(_message.Message):
    __slots__ = ("worker", "lease_ms", "runtime")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    worker: str
    lease_ms: float
    runtime: _contracts_pb2.Runtime
    def __init__(self, worker: _Optional[str] = ..., lease_ms: _Optional[float] = ..., runtime: _Optional[_Union[_contracts_pb2.Runtime, _Mapping]] = ...) -> None: ...

class ClaimKernelResponse(_message.Message):
    __slots__ = ("claim",)
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    claim: _contracts_pb2.KernelClaim
    def __init__(self, claim: _Optional[_Union[_contracts_pb2.KernelClaim, _Mapping]] = ...) -> None: ...

class CompleteKernelRequest(_message.Message):
    __slots__ = ("claim", "report")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    claim: _contracts_pb2.KernelClaim
    report: _contracts_pb2.ValidationReport
    def __init__(self, claim: _Optional[_Union[_contracts_pb2.KernelClaim, _Mapping]] = ..., report: _Optional[_Union[_contracts_pb2.ValidationReport, _Mapping]] = ...) -> None: ...

class CompleteKernelResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _contracts_pb2.KernelRecord
    def __init__(self, record: _Optional[_Union[_contracts_pb2.KernelRecord, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("blueprint", "kernel", "lease_ms")
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    blueprint: _contracts_pb2.BlueprintClaim
    kernel: _contracts_pb2.KernelClaim
    lease_ms: float
    def __init__(self, blueprint: _Optional[_Union[_contracts_pb2.BlueprintClaim, _Mapping]] = ..., kernel: _Optional[_Union[_contracts_pb2.KernelClaim, _Mapping]] = ..., lease_ms: _Optional[float] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("expires",)
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    expires: float
    def __init__(self, expires: _Optional[float] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("blueprint", "kernel")
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    blueprint: _contracts_pb2.BlueprintClaim
    kernel: _contracts_pb2.KernelClaim
    def __init__(self, blueprint: _Optional[_Union[_contracts_pb2.BlueprintClaim, _Mapping]] = ..., kernel: _Optional[_Union[_contracts_pb2.KernelClaim, _Mapping]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBlueprintsRequest(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: _contracts_pb2.SiteSignature
    def __init__(self, signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ...) -> None: ...

class ListKernelsRequest(_message.Message):
    __slots__ = ("signature", "status", "tags")
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    signature: _contracts_pb2.SiteSignature
    status: _contracts_pb2.KernelStatus
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ..., status: _Optional[_Union[_contracts_pb2.KernelStatus, str]] = ..., tags: _Optional[_Iterable[str]] = ...) -> None: ...

class GetKernelRequest(_message.Message):
    __slots__ = ("kernel_id",)
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    kernel_id: str
    def __init__(self, kernel_id: _Optional[str] = ...) -> None: ...

class GetKernelResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _contracts_pb2.KernelRecord
    def __init__(self, record: _Optional[_Union[_contracts_pb2.KernelRecord, _Mapping]] = ...) -> None: ...

class FetchArtifactRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class FetchArtifactResponse(_message.Message):
    __slots__ = ("chunk", "size")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    size: int
    def __init__(self, chunk: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class GetDepthsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDepthsResponse(_message.Message):
    __slots__ = ("depths",)
    DEPTHS_FIELD_NUMBER: _ClassVar[int]
    depths: _contracts_pb2.QueueDepths
    def __init__(self, depths: _Optional[_Union[_contracts_pb2.QueueDepths, _Mapping]] = ...) -> None: ...

class GetCapacityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapacityResponse(_message.Message):
    __slots__ = ("factor",)
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    factor: float
    def __init__(self, factor: _Optional[float] = ...) -> None: ...

class ListLeasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListChangesRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class QuarantineRequest(_message.Message):
    __slots__ = ("kernel_id", "reason")
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kernel_id: str
    reason: str
    def __init__(self, kernel_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class QuarantineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AddReportRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _contracts_pb2.FieldReport
    def __init__(self, report: _Optional[_Union[_contracts_pb2.FieldReport, _Mapping]] = ...) -> None: ...

class AddReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReportsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ArchiveRequest(_message.Message):
    __slots__ = ("blueprint_id", "signature", "reason")
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    blueprint_id: str
    signature: _contracts_pb2.SiteSignature
    reason: str
    def __init__(self, blueprint_id: _Optional[str] = ..., signature: _Optional[_Union[_contracts_pb2.SiteSignature, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class ArchiveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RetireRequest(_message.Message):
    __slots__ = ("kernel_id", "reason")
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kernel_id: str
    reason: str
    def __init__(self, kernel_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RetireResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
