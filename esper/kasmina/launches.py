"""Launch plans, checked against the manifest beside them and handed to the extension."""

from __future__ import annotations

from typing import Any

from esper.errors import ArtifactCorrupt
from esper.leyline.artifact import PLAN, Manifest
from esper.leyline.launch import TYPES, Buffer, Extent, Half, Plan, parse_plan


def check_plan(path: object, manifest: Manifest, text: bytes, cubins: bytes) -> Plan:
    """The plan of an artifact, if it fits its machine code and takes and returns what its
    manifest says.

    Raises:
        ArtifactCorrupt: it does not; `path` names the artifact in the message.
    """
    try:
        plan = parse_plan(text, cubins)
    except ArtifactCorrupt as e:
        raise ArtifactCorrupt(f"{path}: {PLAN}: {e}; compile the blueprint again") from e
    signature = manifest.signature
    type_ = TYPES.get(signature.dtype)
    if type_ is None:
        raise ArtifactCorrupt(f"{path}: {PLAN}: no plan can have tensors of {signature.dtype}")
    forward, backward = plan.forward, plan.backward
    site = [Buffer(shape=(signature.channels,), rows=True, type=type_)]
    try:
        returned = [forward.buffers[i] for i in forward.outputs]
        sources = [_source(s, forward, type_) for s in manifest.backward_inputs]
        gradients = [backward.buffers[backward.outputs[i]] for i in manifest.gradients]
    except IndexError as e:
        raise ArtifactCorrupt(
            f"{path}: the manifest speaks of inputs or outputs that {PLAN} does not have"
        ) from e
    wanted = [*site, *(Buffer(shape=p.shape, type=type_) for p in manifest.parameters)]
    like_h = [i for i, s in enumerate(manifest.backward_inputs) if s in ("in:0", "grad")]
    for what, found, expected in (
        ("device", signature.device, "cuda"),
        ("arch", plan.arch, manifest.toolchain.isa),
        ("inputs of the forward", forward.inputs,
         (type_, "fp32", *(type_ for _ in manifest.parameters))),
        ("inputs of the backward", list(backward.inputs), sources),
        ("input of the forward that is h", forward.like_h, 0),
        ("whether the backward knows h's shape", backward.like_h in like_h, True),
        ("the output", returned[:1], site),
        ("the gradients", gradients, wanted),
    ):
        if found != expected:
            raise ArtifactCorrupt(
                f"{path}: {PLAN} and the manifest do not belong together: {what}: {found}, "
                f"expected {expected}; compile the blueprint again"
            )
    return plan


def _source(source: str, forward: Half, type_: str) -> str:
    if source == "grad":
        return type_
    kind, _, index = source.partition(":")
    if kind == "in":
        return forward.inputs[int(index)]
    return forward.buffers[forward.outputs[int(index)]].type


def as_tuples(plan: Plan) -> tuple[Any, ...]:
    """The plan as csrc/launch_plan.h's `RawPlan` takes it."""
    kernels = [(k.name, k.offset, k.bytes, [_bytes(t) for t in k.parameters], k.hidden,
                32 * k.warps, k.shared) for k in plan.kernels]
    return kernels, _half(plan.forward), _half(plan.backward)


def _bytes(type_: str) -> int:
    return 4 if type_ == "i32" else 8


def _half(half: Half) -> tuple[Any, ...]:
    buffers = [(list(b.shape), b.rows, b.type) for b in half.buffers]
    launches = [(step.kernel, [_extent(e) for e in step.grid],
                 [_argument(a) for a in step.arguments]) for step in half.launches]
    return half.like_h, len(half.inputs), buffers, launches, list(half.outputs)


def _extent(extent: Extent) -> tuple[int, int, int]:
    return extent.times, extent.over, extent.plus


def _argument(argument: str | Extent) -> tuple[str, int, tuple[int, int, int]]:
    """(what, index, number): of "in" and "buf" the index counts, of "number" the number."""
    if isinstance(argument, Extent):
        return "number", 0, _extent(argument)
    kind, _, index = argument.partition(":")
    return kind, int(index), (0, 1, 0)
