from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SiteKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SITE_KIND_UNSPECIFIED: _ClassVar[SiteKind]
    SITE_KIND_FEATURES: _ClassVar[SiteKind]
    SITE_KIND_TOKENS: _ClassVar[SiteKind]
    SITE_KIND_MAP: _ClassVar[SiteKind]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    D_TYPE_UNSPECIFIED: _ClassVar[DType]
    D_TYPE_FLOAT32: _ClassVar[DType]
    D_TYPE_FLOAT64: _ClassVar[DType]
    D_TYPE_BFLOAT16: _ClassVar[DType]
    D_TYPE_FLOAT16: _ClassVar[DType]

class Op(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OP_UNSPECIFIED: _ClassVar[Op]
    OP_LINEAR: _ClassVar[Op]
    OP_CONV: _ClassVar[Op]
    OP_DEPTHWISE: _ClassVar[Op]
    OP_LAYER_NORM: _ClassVar[Op]
    OP_RMS_NORM: _ClassVar[Op]
    OP_GROUP_NORM: _ClassVar[Op]
    OP_RELU: _ClassVar[Op]
    OP_GELU: _ClassVar[Op]
    OP_SILU: _ClassVar[Op]
    OP_TANH: _ClassVar[Op]
    OP_SIGMOID: _ClassVar[Op]
    OP_ADD: _ClassVar[Op]
    OP_MUL: _ClassVar[Op]
    OP_SCALE: _ClassVar[Op]
    OP_MEAN_POOL: _ClassVar[Op]
    OP_ATTENTION: _ClassVar[Op]

class Init(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INIT_UNSPECIFIED: _ClassVar[Init]
    INIT_DEFAULT: _ClassVar[Init]
    INIT_ZERO: _ClassVar[Init]

class Pipeline(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIPELINE_UNSPECIFIED: _ClassVar[Pipeline]
    PIPELINE_FAST: _ClassVar[Pipeline]
    PIPELINE_STANDARD: _ClassVar[Pipeline]
    PIPELINE_AGGRESSIVE: _ClassVar[Pipeline]

class SpeedVerdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPEED_VERDICT_UNSPECIFIED: _ClassVar[SpeedVerdict]
    SPEED_VERDICT_FAST: _ClassVar[SpeedVerdict]
    SPEED_VERDICT_SAME: _ClassVar[SpeedVerdict]
    SPEED_VERDICT_SLOW: _ClassVar[SpeedVerdict]
    SPEED_VERDICT_AMBIGUOUS: _ClassVar[SpeedVerdict]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_EMERGENCY: _ClassVar[Priority]
    PRIORITY_STRATEGIC: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_EXPERIMENTAL: _ClassVar[Priority]
    PRIORITY_BACKGROUND: _ClassVar[Priority]

class BlueprintStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLUEPRINT_STATUS_UNSPECIFIED: _ClassVar[BlueprintStatus]
    BLUEPRINT_STATUS_UNVALIDATED: _ClassVar[BlueprintStatus]
    BLUEPRINT_STATUS_COMPILING: _ClassVar[BlueprintStatus]
    BLUEPRINT_STATUS_COMPILED: _ClassVar[BlueprintStatus]
    BLUEPRINT_STATUS_INVALID: _ClassVar[BlueprintStatus]
    BLUEPRINT_STATUS_ARCHIVED: _ClassVar[BlueprintStatus]

class KernelStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KERNEL_STATUS_UNSPECIFIED: _ClassVar[KernelStatus]
    KERNEL_STATUS_PENDING_BENCHMARKING: _ClassVar[KernelStatus]
    KERNEL_STATUS_BENCHMARKING: _ClassVar[KernelStatus]
    KERNEL_STATUS_VALIDATED: _ClassVar[KernelStatus]
    KERNEL_STATUS_REJECTED: _ClassVar[KernelStatus]
    KERNEL_STATUS_QUARANTINED: _ClassVar[KernelStatus]
    KERNEL_STATUS_RETIRED: _ClassVar[KernelStatus]

class SeedState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEED_STATE_UNSPECIFIED: _ClassVar[SeedState]
    SEED_STATE_DORMANT: _ClassVar[SeedState]
    SEED_STATE_GERMINATED: _ClassVar[SeedState]
    SEED_STATE_TRAINING: _ClassVar[SeedState]
    SEED_STATE_GRAFTING: _ClassVar[SeedState]
    SEED_STATE_STABILIZATION: _ClassVar[SeedState]
    SEED_STATE_EVALUATING: _ClassVar[SeedState]
    SEED_STATE_FINE_TUNING: _ClassVar[SeedState]
    SEED_STATE_FOSSILIZED: _ClassVar[SeedState]
    SEED_STATE_CULLED: _ClassVar[SeedState]
    SEED_STATE_CANCELLED: _ClassVar[SeedState]
    SEED_STATE_ROLLED_BACK: _ClassVar[SeedState]

class Topic(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOPIC_UNSPECIFIED: _ClassVar[Topic]
    TOPIC_SEED_HEALTH: _ClassVar[Topic]
    TOPIC_COMMANDS: _ClassVar[Topic]
    TOPIC_FIELD_REPORTS: _ClassVar[Topic]
    TOPIC_BLUEPRINT_SUBMITTED: _ClassVar[Topic]
    TOPIC_KERNEL_READY: _ClassVar[Topic]
    TOPIC_KERNEL_CHARACTERIZED: _ClassVar[Topic]
    TOPIC_EPOCH: _ClassVar[Topic]
    TOPIC_ROLLBACK: _ClassVar[Topic]
    TOPIC_CAPACITY: _ClassVar[Topic]
SITE_KIND_UNSPECIFIED: SiteKind
SITE_KIND_FEATURES: SiteKind
SITE_KIND_TOKENS: SiteKind
SITE_KIND_MAP: SiteKind
D_TYPE_UNSPECIFIED: DType
D_TYPE_FLOAT32: DType
D_TYPE_FLOAT64: DType
D_TYPE_BFLOAT16: DType
D_TYPE_FLOAT16: DType
OP_UNSPECIFIED: Op
OP_LINEAR: Op
OP_CONV: Op
OP_DEPTHWISE: Op
OP_LAYER_NORM: Op
OP_RMS_NORM: Op
OP_GROUP_NORM: Op
OP_RELU: Op
OP_GELU: Op
OP_SILU: Op
OP_TANH: Op
OP_SIGMOID: Op
OP_ADD: Op
OP_MUL: Op
OP_SCALE: Op
OP_MEAN_POOL: Op
OP_ATTENTION: Op
INIT_UNSPECIFIED: Init
INIT_DEFAULT: Init
INIT_ZERO: Init
PIPELINE_UNSPECIFIED: Pipeline
PIPELINE_FAST: Pipeline
PIPELINE_STANDARD: Pipeline
PIPELINE_AGGRESSIVE: Pipeline
SPEED_VERDICT_UNSPECIFIED: SpeedVerdict
SPEED_VERDICT_FAST: SpeedVerdict
SPEED_VERDICT_SAME: SpeedVerdict
SPEED_VERDICT_SLOW: SpeedVerdict
SPEED_VERDICT_AMBIGUOUS: SpeedVerdict
PRIORITY_UNSPECIFIED: Priority
PRIORITY_EMERGENCY: Priority
PRIORITY_STRATEGIC: Priority
PRIORITY_NORMAL: Priority
PRIORITY_EXPERIMENTAL: Priority
PRIORITY_BACKGROUND: Priority
BLUEPRINT_STATUS_UNSPECIFIED: BlueprintStatus
BLUEPRINT_STATUS_UNVALIDATED: BlueprintStatus
BLUEPRINT_STATUS_COMPILING: BlueprintStatus
BLUEPRINT_STATUS_COMPILED: BlueprintStatus
BLUEPRINT_STATUS_INVALID: BlueprintStatus
BLUEPRINT_STATUS_ARCHIVED: BlueprintStatus
KERNEL_STATUS_UNSPECIFIED: KernelStatus
KERNEL_STATUS_PENDING_BENCHMARKING: KernelStatus
KERNEL_STATUS_BENCHMARKING: KernelStatus
KERNEL_STATUS_VALIDATED: KernelStatus
KERNEL_STATUS_REJECTED: KernelStatus
KERNEL_STATUS_QUARANTINED: KernelStatus
KERNEL_STATUS_RETIRED: KernelStatus
SEED_STATE_UNSPECIFIED: SeedState
SEED_STATE_DORMANT: SeedState
SEED_STATE_GERMINATED: SeedState
SEED_STATE_TRAINING: SeedState
SEED_STATE_GRAFTING: SeedState
SEED_STATE_STABILIZATION: SeedState
SEED_STATE_EVALUATING: SeedState
SEED_STATE_FINE_TUNING: SeedState
SEED_STATE_FOSSILIZED: SeedState
SEED_STATE_CULLED: SeedState
SEED_STATE_CANCELLED: SeedState
SEED_STATE_ROLLED_BACK: SeedState
TOPIC_UNSPECIFIED: Topic
TOPIC_SEED_HEALTH: Topic
TOPIC_COMMANDS: Topic
TOPIC_FIELD_REPORTS: Topic
TOPIC_BLUEPRINT_SUBMITTED: Topic
TOPIC_KERNEL_READY: Topic
TOPIC_KERNEL_CHARACTERIZED: Topic
TOPIC_EPOCH: Topic
TOPIC_ROLLBACK: Topic
TOPIC_CAPACITY: Topic

class SiteSignature(_message.Message):
    __slots__ = ("kind", "channels", "dtype", "device", "causal", "standalone")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_FIELD_NUMBER: _ClassVar[int]
    STANDALONE_FIELD_NUMBER: _ClassVar[int]
    kind: SiteKind
    channels: int
    dtype: DType
    device: str
    causal: bool
    standalone: bool
    def __init__(self, kind: _Optional[_Union[SiteKind, str]] = ..., channels: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., device: _Optional[str] = ..., causal: bool = ..., standalone: bool = ...) -> None: ...

class Width(_message.Message):
    __slots__ = ("times", "over", "plus")
    TIMES_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    PLUS_FIELD_NUMBER: _ClassVar[int]
    times: int
    over: int
    plus: int
    def __init__(self, times: _Optional[int] = ..., over: _Optional[int] = ..., plus: _Optional[int] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("id", "op", "inputs", "out", "kernel", "groups", "heads", "bias", "init", "eps")
    ID_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    INIT_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    id: str
    op: Op
    inputs: _containers.RepeatedScalarFieldContainer[str]
    out: Width
    kernel: int
    groups: int
    heads: int
    bias: bool
    init: Init
    eps: float
    def __init__(self, id: _Optional[str] = ..., op: _Optional[_Union[Op, str]] = ..., inputs: _Optional[_Iterable[str]] = ..., out: _Optional[_Union[Width, _Mapping]] = ..., kernel: _Optional[int] = ..., groups: _Optional[int] = ..., heads: _Optional[int] = ..., bias: bool = ..., init: _Optional[_Union[Init, str]] = ..., eps: _Optional[float] = ...) -> None: ...

class BlueprintIR(_message.Message):
    __slots__ = ("version", "kind", "name", "nodes", "output")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    version: int
    kind: SiteKind
    name: str
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    output: str
    def __init__(self, version: _Optional[int] = ..., kind: _Optional[_Union[SiteKind, str]] = ..., name: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., output: _Optional[str] = ...) -> None: ...

class Toolchain(_message.Message):
    __slots__ = ("torch", "isa", "compiler", "esper")
    TORCH_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    COMPILER_FIELD_NUMBER: _ClassVar[int]
    ESPER_FIELD_NUMBER: _ClassVar[int]
    torch: str
    isa: str
    compiler: str
    esper: str
    def __init__(self, torch: _Optional[str] = ..., isa: _Optional[str] = ..., compiler: _Optional[str] = ..., esper: _Optional[str] = ...) -> None: ...

class Runtime(_message.Message):
    __slots__ = ("torch", "isas")
    TORCH_FIELD_NUMBER: _ClassVar[int]
    ISAS_FIELD_NUMBER: _ClassVar[int]
    torch: str
    isas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, torch: _Optional[str] = ..., isas: _Optional[_Iterable[str]] = ...) -> None: ...

class ParameterSpec(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class MemberDigest(_message.Message):
    __slots__ = ("member", "sha256")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    member: str
    sha256: str
    def __init__(self, member: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format", "kernel_id", "blueprint_id", "signature", "pipeline", "toolchain", "parameters", "backward_inputs", "gradients", "sha256", "compile_ms", "flops")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    TOOLCHAIN_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_INPUTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    COMPILE_MS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    format: int
    kernel_id: str
    blueprint_id: str
    signature: SiteSignature
    pipeline: Pipeline
    toolchain: Toolchain
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterSpec]
    backward_inputs: _containers.RepeatedScalarFieldContainer[str]
    gradients: _containers.RepeatedScalarFieldContainer[int]
    sha256: _containers.RepeatedCompositeFieldContainer[MemberDigest]
    compile_ms: float
    flops: int
    def __init__(self, format: _Optional[int] = ..., kernel_id: _Optional[str] = ..., blueprint_id: _Optional[str] = ..., signature: _Optional[_Union[SiteSignature, _Mapping]] = ..., pipeline: _Optional[_Union[Pipeline, str]] = ..., toolchain: _Optional[_Union[Toolchain, _Mapping]] = ..., parameters: _Optional[_Iterable[_Union[ParameterSpec, _Mapping]]] = ..., backward_inputs: _Optional[_Iterable[str]] = ..., gradients: _Optional[_Iterable[int]] = ..., sha256: _Optional[_Iterable[_Union[MemberDigest, _Mapping]]] = ..., compile_ms: _Optional[float] = ..., flops: _Optional[int] = ...) -> None: ...

class Hardware(_message.Message):
    __slots__ = ("cpu", "isa", "cores", "threads")
    CPU_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    cpu: str
    isa: str
    cores: int
    threads: int
    def __init__(self, cpu: _Optional[str] = ..., isa: _Optional[str] = ..., cores: _Optional[int] = ..., threads: _Optional[int] = ...) -> None: ...

class Roofline(_message.Message):
    __slots__ = ("memory_bytes_per_second", "cache_bytes_per_second", "flops_per_second", "dtype")
    MEMORY_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    memory_bytes_per_second: float
    cache_bytes_per_second: float
    flops_per_second: float
    dtype: str
    def __init__(self, memory_bytes_per_second: _Optional[float] = ..., cache_bytes_per_second: _Optional[float] = ..., flops_per_second: _Optional[float] = ..., dtype: _Optional[str] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("duration_ms",)
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    duration_ms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, duration_ms: _Optional[_Iterable[float]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("kernel", "eager", "compiled", "speedup", "low", "high")
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    EAGER_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    kernel: Latency
    eager: Latency
    compiled: Latency
    speedup: float
    low: float
    high: float
    def __init__(self, kernel: _Optional[_Union[Latency, _Mapping]] = ..., eager: _Optional[_Union[Latency, _Mapping]] = ..., compiled: _Optional[_Union[Latency, _Mapping]] = ..., speedup: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("flops", "bytes")
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    flops: int
    bytes: int
    def __init__(self, flops: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Measurement(_message.Message):
    __slots__ = ("batch", "space", "speedup", "low", "high", "verdict", "kernel_ms", "eager_ms", "compiled_ms", "stopped", "forward", "backward", "cost", "peak_bytes", "eager_peak_bytes", "note")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_MS_FIELD_NUMBER: _ClassVar[int]
    EAGER_MS_FIELD_NUMBER: _ClassVar[int]
    COMPILED_MS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    EAGER_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    batch: int
    space: int
    speedup: float
    low: float
    high: float
    verdict: SpeedVerdict
    kernel_ms: _containers.RepeatedScalarFieldContainer[float]
    eager_ms: _containers.RepeatedScalarFieldContainer[float]
    compiled_ms: _containers.RepeatedScalarFieldContainer[float]
    stopped: str
    forward: Part
    backward: Part
    cost: Cost
    peak_bytes: int
    eager_peak_bytes: int
    note: str
    def __init__(self, batch: _Optional[int] = ..., space: _Optional[int] = ..., speedup: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., verdict: _Optional[_Union[SpeedVerdict, str]] = ..., kernel_ms: _Optional[_Iterable[float]] = ..., eager_ms: _Optional[_Iterable[float]] = ..., compiled_ms: _Optional[_Iterable[float]] = ..., stopped: _Optional[str] = ..., forward: _Optional[_Union[Part, _Mapping]] = ..., backward: _Optional[_Union[Part, _Mapping]] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., peak_bytes: _Optional[int] = ..., eager_peak_bytes: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class ProofCase(_message.Message):
    __slots__ = ("name", "batch", "space", "worst_ratio", "passed", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    WORST_RATIO_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    batch: int
    space: int
    worst_ratio: float
    passed: bool
    detail: str
    def __init__(self, name: _Optional[str] = ..., batch: _Optional[int] = ..., space: _Optional[int] = ..., worst_ratio: _Optional[float] = ..., passed: bool = ..., detail: _Optional[str] = ...) -> None: ...

class Tag(_message.Message):
    __slots__ = ("name", "evidence", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    evidence: str
    value: float
    def __init__(self, name: _Optional[str] = ..., evidence: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Drift(_message.Message):
    __slots__ = ("dtype", "steps", "kernel", "eager")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    EAGER_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    steps: int
    kernel: float
    eager: float
    def __init__(self, dtype: _Optional[str] = ..., steps: _Optional[int] = ..., kernel: _Optional[float] = ..., eager: _Optional[float] = ...) -> None: ...

class Risk(_message.Message):
    __slots__ = ("score", "basis")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    score: float
    basis: str
    def __init__(self, score: _Optional[float] = ..., basis: _Optional[str] = ...) -> None: ...

class ValidationReport(_message.Message):
    __slots__ = ("kernel_id", "accepted", "reason", "proof", "measurements", "tags", "hardware", "peak_memory_bytes", "duration_ms", "eager_peak_memory_bytes", "roofline", "drift", "risk")
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    MEASUREMENTS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    EAGER_PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROOFLINE_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    kernel_id: str
    accepted: bool
    reason: str
    proof: _containers.RepeatedCompositeFieldContainer[ProofCase]
    measurements: _containers.RepeatedCompositeFieldContainer[Measurement]
    tags: _containers.RepeatedCompositeFieldContainer[Tag]
    hardware: Hardware
    peak_memory_bytes: int
    duration_ms: float
    eager_peak_memory_bytes: int
    roofline: Roofline
    drift: _containers.RepeatedCompositeFieldContainer[Drift]
    risk: Risk
    def __init__(self, kernel_id: _Optional[str] = ..., accepted: bool = ..., reason: _Optional[str] = ..., proof: _Optional[_Iterable[_Union[ProofCase, _Mapping]]] = ..., measurements: _Optional[_Iterable[_Union[Measurement, _Mapping]]] = ..., tags: _Optional[_Iterable[_Union[Tag, _Mapping]]] = ..., hardware: _Optional[_Union[Hardware, _Mapping]] = ..., peak_memory_bytes: _Optional[int] = ..., duration_ms: _Optional[float] = ..., eager_peak_memory_bytes: _Optional[int] = ..., roofline: _Optional[_Union[Roofline, _Mapping]] = ..., drift: _Optional[_Iterable[_Union[Drift, _Mapping]]] = ..., risk: _Optional[_Union[Risk, _Mapping]] = ...) -> None: ...

class BlueprintRecord(_message.Message):
    __slots__ = ("blueprint_id", "signature", "ir", "author", "parents", "interest", "priority", "pipeline", "status", "reason", "submitted", "updated")
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    IR_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    INTEREST_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    blueprint_id: str
    signature: SiteSignature
    ir: BlueprintIR
    author: str
    parents: _containers.RepeatedScalarFieldContainer[str]
    interest: float
    priority: Priority
    pipeline: Pipeline
    status: BlueprintStatus
    reason: str
    submitted: float
    updated: float
    def __init__(self, blueprint_id: _Optional[str] = ..., signature: _Optional[_Union[SiteSignature, _Mapping]] = ..., ir: _Optional[_Union[BlueprintIR, _Mapping]] = ..., author: _Optional[str] = ..., parents: _Optional[_Iterable[str]] = ..., interest: _Optional[float] = ..., priority: _Optional[_Union[Priority, str]] = ..., pipeline: _Optional[_Union[Pipeline, str]] = ..., status: _Optional[_Union[BlueprintStatus, str]] = ..., reason: _Optional[str] = ..., submitted: _Optional[float] = ..., updated: _Optional[float] = ...) -> None: ...

class KernelRecord(_message.Message):
    __slots__ = ("kernel_id", "blueprint_id", "manifest", "digest", "size", "status", "reason", "report", "created", "updated")
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    kernel_id: str
    blueprint_id: str
    manifest: Manifest
    digest: str
    size: int
    status: KernelStatus
    reason: str
    report: ValidationReport
    created: float
    updated: float
    def __init__(self, kernel_id: _Optional[str] = ..., blueprint_id: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., status: _Optional[_Union[KernelStatus, str]] = ..., reason: _Optional[str] = ..., report: _Optional[_Union[ValidationReport, _Mapping]] = ..., created: _Optional[float] = ..., updated: _Optional[float] = ...) -> None: ...

class BlueprintClaim(_message.Message):
    __slots__ = ("record", "worker", "token", "expires")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    record: BlueprintRecord
    worker: str
    token: int
    expires: float
    def __init__(self, record: _Optional[_Union[BlueprintRecord, _Mapping]] = ..., worker: _Optional[str] = ..., token: _Optional[int] = ..., expires: _Optional[float] = ...) -> None: ...

class KernelClaim(_message.Message):
    __slots__ = ("record", "worker", "token", "expires")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    record: KernelRecord
    worker: str
    token: int
    expires: float
    def __init__(self, record: _Optional[_Union[KernelRecord, _Mapping]] = ..., worker: _Optional[str] = ..., token: _Optional[int] = ..., expires: _Optional[float] = ...) -> None: ...

class QueueDepths(_message.Message):
    __slots__ = ("karn_to_tezzeret", "tezzeret_to_urabrask", "urabrask_validation", "urza_storage")
    KARN_TO_TEZZERET_FIELD_NUMBER: _ClassVar[int]
    TEZZERET_TO_URABRASK_FIELD_NUMBER: _ClassVar[int]
    URABRASK_VALIDATION_FIELD_NUMBER: _ClassVar[int]
    URZA_STORAGE_FIELD_NUMBER: _ClassVar[int]
    karn_to_tezzeret: int
    tezzeret_to_urabrask: int
    urabrask_validation: int
    urza_storage: int
    def __init__(self, karn_to_tezzeret: _Optional[int] = ..., tezzeret_to_urabrask: _Optional[int] = ..., urabrask_validation: _Optional[int] = ..., urza_storage: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("item", "signature", "worker", "since", "expires")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    item: str
    signature: SiteSignature
    worker: str
    since: float
    expires: float
    def __init__(self, item: _Optional[str] = ..., signature: _Optional[_Union[SiteSignature, _Mapping]] = ..., worker: _Optional[str] = ..., since: _Optional[float] = ..., expires: _Optional[float] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("sequence", "time", "item", "signature_id", "before", "after", "reason")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: float
    item: str
    signature_id: str
    before: str
    after: str
    reason: str
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[float] = ..., item: _Optional[str] = ..., signature_id: _Optional[str] = ..., before: _Optional[str] = ..., after: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class SeedContext(_message.Message):
    __slots__ = ("policy", "site", "depth", "relative_score", "fossils", "epoch", "growths", "loss_share", "parameters", "flops", "speedup", "layers", "width", "taps", "tried", "earned")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_SCORE_FIELD_NUMBER: _ClassVar[int]
    FOSSILS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROWTHS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SHARE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    SPEEDUP_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    TRIED_FIELD_NUMBER: _ClassVar[int]
    EARNED_FIELD_NUMBER: _ClassVar[int]
    policy: str
    site: SiteSignature
    depth: float
    relative_score: float
    fossils: int
    epoch: int
    growths: int
    loss_share: float
    parameters: int
    flops: int
    speedup: float
    layers: int
    width: float
    taps: int
    tried: int
    earned: float
    def __init__(self, policy: _Optional[str] = ..., site: _Optional[_Union[SiteSignature, _Mapping]] = ..., depth: _Optional[float] = ..., relative_score: _Optional[float] = ..., fossils: _Optional[int] = ..., epoch: _Optional[int] = ..., growths: _Optional[int] = ..., loss_share: _Optional[float] = ..., parameters: _Optional[int] = ..., flops: _Optional[int] = ..., speedup: _Optional[float] = ..., layers: _Optional[int] = ..., width: _Optional[float] = ..., taps: _Optional[int] = ..., tried: _Optional[int] = ..., earned: _Optional[float] = ...) -> None: ...

class FieldReport(_message.Message):
    __slots__ = ("report_id", "run_id", "trace_id", "site", "kernel_id", "blueprint_id", "outcome", "reason", "gain", "loss_before", "loss_after", "epochs", "time", "context")
    REPORT_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    report_id: str
    run_id: str
    trace_id: str
    site: str
    kernel_id: str
    blueprint_id: str
    outcome: SeedState
    reason: str
    gain: float
    loss_before: float
    loss_after: float
    epochs: int
    time: float
    context: SeedContext
    def __init__(self, report_id: _Optional[str] = ..., run_id: _Optional[str] = ..., trace_id: _Optional[str] = ..., site: _Optional[str] = ..., kernel_id: _Optional[str] = ..., blueprint_id: _Optional[str] = ..., outcome: _Optional[_Union[SeedState, str]] = ..., reason: _Optional[str] = ..., gain: _Optional[float] = ..., loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., epochs: _Optional[int] = ..., time: _Optional[float] = ..., context: _Optional[_Union[SeedContext, _Mapping]] = ...) -> None: ...

class SeedHealth(_message.Message):
    __slots__ = ("run_id", "trace_id", "site", "kernel_id", "state", "epoch", "step", "alpha", "drift", "grad_norm", "gain")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    trace_id: str
    site: str
    kernel_id: str
    state: SeedState
    epoch: int
    step: int
    alpha: float
    drift: float
    grad_norm: float
    gain: float
    def __init__(self, run_id: _Optional[str] = ..., trace_id: _Optional[str] = ..., site: _Optional[str] = ..., kernel_id: _Optional[str] = ..., state: _Optional[_Union[SeedState, str]] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., alpha: _Optional[float] = ..., drift: _Optional[float] = ..., grad_norm: _Optional[float] = ..., gain: _Optional[float] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("event_id", "topic", "sender", "time", "trace_id", "priority", "schema_version", "body_json", "seed_health", "field_report", "blueprint", "kernel")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    BODY_JSON_FIELD_NUMBER: _ClassVar[int]
    SEED_HEALTH_FIELD_NUMBER: _ClassVar[int]
    FIELD_REPORT_FIELD_NUMBER: _ClassVar[int]
    BLUEPRINT_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    topic: Topic
    sender: str
    time: float
    trace_id: str
    priority: Priority
    schema_version: int
    body_json: str
    seed_health: SeedHealth
    field_report: FieldReport
    blueprint: BlueprintRecord
    kernel: KernelRecord
    def __init__(self, event_id: _Optional[str] = ..., topic: _Optional[_Union[Topic, str]] = ..., sender: _Optional[str] = ..., time: _Optional[float] = ..., trace_id: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ..., schema_version: _Optional[int] = ..., body_json: _Optional[str] = ..., seed_health: _Optional[_Union[SeedHealth, _Mapping]] = ..., field_report: _Optional[_Union[FieldReport, _Mapping]] = ..., blueprint: _Optional[_Union[BlueprintRecord, _Mapping]] = ..., kernel: _Optional[_Union[KernelRecord, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error", "message", "node")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    node: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...
