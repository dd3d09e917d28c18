"""One full sample of every contract, first, and then ones that lack what may be absent.

Run as `python -m tests.leyline.wire_samples`, this writes golden files for messages that have
none yet and enters new numbers into the ledger. It never changes what is there: what was
written once must be readable for ever.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format

from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Runtime, Toolchain
from esper.leyline.base import Contract
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.command import FieldReport, SeedContext, SeedHealth
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import (
    BlueprintClaim,
    BlueprintRecord,
    Change,
    KernelClaim,
    KernelRecord,
    Lease,
    QueueDepths,
)
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, SeedState
from esper.leyline.payloads import announce
from esper.leyline.proto import wire
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.leyline.verdict import (
    Cost,
    Drift,
    Hardware,
    Latency,
    Measurement,
    Part,
    ProofCase,
    Risk,
    Roofline,
    SpeedVerdict,
    Tag,
    ValidationReport,
)

SITE = SiteSignature(kind=SiteKind.TOKENS, channels=48, dtype=DType.BFLOAT16, device="cuda",
                     causal=True)
WIDTH = Width(times=3, over=4, plus=1)
NODE = Node(id="mix", op=Op.DEPTHWISE, inputs=("up",), kernel=5, bias=False, init=Init.ZERO)
IR = BlueprintIR(
    kind=SiteKind.TOKENS, name="sample",
    nodes=(
        Node(id="norm", op=Op.LAYER_NORM, inputs=("h",)),
        Node(id="look", op=Op.ATTENTION, inputs=("norm", "norm", "h"), heads=4),
        Node(id="up", op=Op.LINEAR, inputs=("look",), out=C, bias=True, init=Init.DEFAULT),
        NODE,
        Node(id="sum", op=Op.ADD, inputs=("mix", "h")),
    ),
    output="sum",
)
GROUPED = Node(id="groups", op=Op.GROUP_NORM, inputs=("h",), groups=8)
TOOLS = Toolchain(torch="2.13.0+cpu", isa="AVX512", compiler="g++ 12.2", esper="0.1.0")
PARAMETER = ParameterSpec(name="up.weight", shape=(48, 48))
MANIFEST = Manifest(
    kernel_id="k-0123", blueprint_id=IR.id, signature=SITE, pipeline=Pipeline.AGGRESSIVE,
    toolchain=TOOLS, parameters=(PARAMETER,), backward_inputs=("in:0", "out:1", "grad"),
    gradients=(0, 2, -1), sha256={"forward.so": "ab" * 32, "backward.so": "cd" * 32},
    compile_seconds=8.5, flops=1 << 40,
)
HARDWARE = Hardware(cpu="A Processor 9000", isa="AVX512", cores=64, threads=2)
LATENCY = Latency(seconds=(0.25, 0.5))
PART = Part(kernel=LATENCY, eager=LATENCY, compiled=LATENCY, speedup=1.5, low=1.25, high=1.75)
COST = Cost(flops=1 << 40, bytes=1 << 33)
MEASURED = Measurement(
    batch=16, space=8, speedup=1.5, low=1.25, high=1.75, verdict=SpeedVerdict.FAST,
    kernel_seconds=(0.25, 0.5), eager_seconds=(0.375, 0.75), compiled_seconds=(0.125, 0.25),
    stopped="narrow", forward=PART, backward=PART, cost=COST, peak_bytes=1 << 33,
    eager_peak_bytes=1 << 34, note="nothing is missing",
)
BARELY_MEASURED = Measurement(
    batch=16, space=8, speedup=1.5, low=1.25, high=1.75, verdict=SpeedVerdict.AMBIGUOUS,
    kernel_seconds=(0.25,), eager_seconds=(0.375,),
)
ROOFLINE = Roofline(memory_bytes_per_second=2.5e10, cache_bytes_per_second=1.5e11,
                    flops_per_second=1.25e11, dtype="float32")
DRIFT = Drift(dtype="bfloat16", steps=20, kernel=0.25, eager=0.5)
RISK = Risk(score=0.25, basis="rules")
CASE = ProofCase(name="odd", batch=7, space=5, worst_ratio=0.5, passed=True, detail="up.weight")
TAG = Tag(name="high_speed", evidence="batch 16: 1.5 times eager", value=1.5)
REPORT = ValidationReport(
    kernel_id="k-0123", accepted=True, reason="none, it is sound", proof=(CASE, CASE),
    measurements=(MEASURED,), tags=(TAG,), hardware=HARDWARE, peak_memory_bytes=1 << 33,
    eager_peak_memory_bytes=1 << 34, roofline=ROOFLINE, drift=(DRIFT,), risk=RISK, seconds=12.5,
)
BLUEPRINT = BlueprintRecord(
    blueprint_id=IR.id, signature=SITE, ir=IR, author="karn/mutant", parents=("bp-1", "bp-2"),
    interest=0.75, priority=Priority.EMERGENCY, pipeline=Pipeline.FAST,
    status=BlueprintStatus.COMPILING, reason="claimed by Tezzeret, größer", submitted=1.5e9,
    updated=1.5e9 + 0.125,
)
KERNEL = KernelRecord(
    kernel_id="k-0123", blueprint_id=IR.id, manifest=MANIFEST, digest="ef" * 32, size=123456,
    status=KernelStatus.VALIDATED, reason="fine", report=REPORT, created=1.5e9, updated=1.6e9,
)
CONTEXT = SeedContext(
    policy="bandit-3", site=SITE, depth=0.25, relative_score=0.75, fossils=1, epoch=6, growths=3,
    loss_share=0.5, parameters=1 << 33, flops=1 << 40, speedup=1.5, layers=2, width=0.5, taps=9,
    tried=4, earned=-0.0625,
)
FIELD = FieldReport(
    report_id="fr-1", run_id="run-1", trace_id="tr-1", site="blocks.3", kernel_id="k-0123",
    blueprint_id=IR.id, outcome=SeedState.FOSSILIZED, reason="it pays", gain=-0.0625,
    loss_before=1.5, loss_after=1.25, epochs=7, time=1.5e9, context=CONTEXT,
)
HEALTH = SeedHealth(
    run_id="run-1", trace_id="tr-1", site="blocks.3", kernel_id="k-0123",
    state=SeedState.GRAFTING, epoch=7, step=1 << 40, alpha=0.25, drift=0.5, grad_norm=1.5,
    gain=-0.0625,
)
EVENT = Event(
    event_id="ev-1", topic=Topic.ROLLBACK, sender="tolaria", time=1.5e9, trace_id="tr-1",
    priority=Priority.STRATEGIC, body={"loss": 2.5, "seeds": ["a", None], "why": "größer"},
)

CONTRACTS: tuple[Contract, ...] = (
    SITE, WIDTH, BLUEPRINT, IR, TOOLS, PARAMETER, MANIFEST, HARDWARE, ROOFLINE, LATENCY, PART, COST,
    MEASURED, DRIFT, RISK, CASE, TAG, REPORT, KERNEL, CONTEXT, FIELD,
    EVENT,
    HEALTH,
    Runtime(torch="2.13.0+cpu", isas=("AVX512", "sm_90")),
    Node(id="all", op=Op.LINEAR, inputs=("h",), out=WIDTH, bias=True, init=Init.ZERO),
    SITE.model_copy(update={"causal": False, "standalone": True}),
    Node(id="fine", op=Op.LAYER_NORM, inputs=("h",), eps=1e-6),
    NODE, GROUPED, IR.node("look"), IR.node("norm"),
    BlueprintClaim(record=BLUEPRINT, worker="forge-1", token=1 << 40, expires=1.7e9),
    KernelClaim(record=KERNEL, worker="bench-1", token=2, expires=1.7e9),
    QueueDepths(karn_to_tezzeret=1, tezzeret_to_urabrask=2, urabrask_validation=3,
                urza_storage=4),
    Lease(item="k-0123", signature=SITE, worker="bench-1", since=1.5e9, expires=1.6e9),
    Change(sequence=1 << 40, time=1.5e9, item="k-0123", signature_id=SITE.id,
           before="BENCHMARKING", after="VALIDATED", reason="sound"),
    *(announce(topic, said, sender="urza", trace_id="tr-1", priority=Priority.BACKGROUND)
      for topic, said in ((Topic.SEED_HEALTH, HEALTH), (Topic.FIELD_REPORTS, FIELD),
                          (Topic.BLUEPRINT_SUBMITTED, BLUEPRINT), (Topic.KERNEL_READY, KERNEL),
                          (Topic.KERNEL_CHARACTERIZED, KERNEL))),
    # Bare ones
    HEALTH.model_copy(update={"drift": None, "grad_norm": None, "gain": None}),
    BLUEPRINT.model_copy(update={"pipeline": None, "parents": (), "reason": ""}),
    KERNEL.model_copy(update={"report": None}),
    BARELY_MEASURED, PART.model_copy(update={"compiled": None}),
    REPORT.model_copy(update={
        "hardware": None, "peak_memory_bytes": None, "eager_peak_memory_bytes": None,
        "measurements": (), "roofline": None, "drift": (), "risk": None}),
    FIELD.model_copy(update={"gain": None, "loss_before": None, "loss_after": None}),
    FIELD.model_copy(update={"context": None}),
    CONTEXT.model_copy(update=dict.fromkeys(
        ("policy", "depth", "relative_score", "loss_share", "speedup", "width", "taps",
         "earned"))),
    Change(sequence=1, time=1.5e9, item="k-0123", signature_id=SITE.id, before=None,
           after="PENDING_BENCHMARKING", reason=""),
)


def filled(message: Any, depth: int = 0) -> Any:
    """`message` with every field set, to values that its name and number decide. Of a oneof
    the last one stays."""
    contracts = {type(value).__name__: value for value in reversed(CONTRACTS)}
    name = message.DESCRIPTOR.name
    if name in contracts:
        message.CopyFrom(wire.to_wire(contracts[name]))
        return message
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            inner = getattr(message, field.name)
            filled(inner.add() if field.is_repeated else inner, depth + 1)
            continue
        value: Any = {
            field.CPPTYPE_STRING: b"\x00\xff" if field.type == field.TYPE_BYTES else field.name,
            field.CPPTYPE_BOOL: True, field.CPPTYPE_DOUBLE: field.number + 0.5,
            field.CPPTYPE_ENUM: 2,
        }.get(field.cpp_type, field.number * 1000)
        if field.is_repeated:
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)
    return message


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    from tests.leyline.test_wire import GOLDEN, MESSAGES, ledger

    GOLDEN.mkdir(exist_ok=True)
    meanings_file, numbers_file = GOLDEN / "meanings.json", GOLDEN / "numbers.json"
    meanings = json.loads(meanings_file.read_text()) if meanings_file.exists() else {}
    for name, kind in MESSAGES.items():
        target = GOLDEN / f"{name}.bin"
        if target.exists():
            continue
        message = filled(kind())
        target.write_bytes(message.SerializeToString(deterministic=True))
        meanings[name] = json_format.MessageToDict(message, preserving_proto_field_name=True)
        print("made", target.name)
    meanings_file.write_text(_text(meanings))
    known = json.loads(numbers_file.read_text()) if numbers_file.exists() else {}
    for name, numbers in ledger().items():
        known[name] = {**numbers, **known.get(name, {})}
    numbers_file.write_text(_text(known))


if __name__ == "__main__":
    main()
