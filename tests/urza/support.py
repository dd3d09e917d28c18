"""Small blueprints and artifacts for tests of the library: real zips, honest manifests, and
libraries of noise, since Urza never opens a kernel."""

from __future__ import annotations

import io
import os
import traceback
import zipfile
from collections.abc import Callable

from esper.leyline.artifact import (
    MEMBERS,
    Manifest,
    ParameterSpec,
    Pipeline,
    Toolchain,
    kernel_id,
)
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR, C, Node, Op, Width
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import Tag, ValidationReport

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=8)
OTHER = SiteSignature(kind=SiteKind.FEATURES, channels=16)
TOOLCHAIN = Toolchain(torch="2.13.0", isa="AVX2", compiler="g++ 12", esper="0.1")


class Clock:
    """Seconds that pass when the test says so. Far from zero, as UTC is."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def blueprint(n: int = 1) -> BlueprintIR:
    """A different blueprint for every n."""
    return BlueprintIR(
        kind=SiteKind.FEATURES,
        nodes=(
            Node(id="down", op=Op.LINEAR, inputs=("h",), out=Width(plus=n)),
            Node(id="up", op=Op.LINEAR, inputs=("down",), out=C),
        ),
        output="up",
    )


def pack(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members(
    ir: BlueprintIR,
    signature: SiteSignature = SIG,
    pipeline: Pipeline = Pipeline.FAST,
    code: bytes = b"\x7fELF not really",
    tools: Toolchain = TOOLCHAIN,
) -> dict[str, bytes]:
    content = {
        "blueprint.json": ir.to_json().encode(),
        "forward.so": code,
        "backward.so": code[::-1],
    }
    parameters = infer(ir, signature).parameters
    manifest = Manifest(
        kernel_id=kernel_id(ir.id, signature, tools, pipeline),
        blueprint_id=ir.id,
        signature=signature,
        pipeline=pipeline,
        toolchain=tools,
        parameters=tuple(ParameterSpec(name=p.name, shape=p.shape) for p in parameters),
        backward_inputs=("grad",),
        gradients=tuple(range(1 + len(parameters))),
        sha256={name: sha256(c) for name, c in content.items()},
        compile_seconds=1.0,
        flops=1,
    )
    content["manifest.json"] = manifest.model_dump_json().encode()
    return {name: content[name] for name in MEMBERS}


def artifact(
    ir: BlueprintIR, signature: SiteSignature = SIG, pipeline: Pipeline = Pipeline.FAST,
    tools: Toolchain = TOOLCHAIN,
) -> bytes:
    return pack(members(ir, signature, pipeline, tools=tools))


def report(kernel: str, *tags: str, accepted: bool = True) -> ValidationReport:
    return ValidationReport(
        kernel_id=kernel,
        accepted=accepted,
        reason="" if accepted else "gradients are wrong",
        tags=tuple(Tag(name=t, evidence="test", value=1.0) for t in tags),
        seconds=0.1,
    )


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
