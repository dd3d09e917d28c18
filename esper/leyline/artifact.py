"""The manifest of a kernel artifact, and the identity of a kernel.

An artifact is one uncompressed zip with exactly these members, in this order:
`manifest.json`, `blueprint.json`, `forward.so`, `backward.so`; or, where a GPU's machine code is
launched without a library around it, `plan.json` and `kernels.cubin` in place of the last two
(see `launch`). There is no pickle in it.

Forward takes `[h, alpha, *params]` and returns `[out, *saved]` with out = blend(h, f(h),
alpha); saved tensors that are forward inputs are not returned. Backward takes the tensors
that `backward_inputs` names and returns gradients that `gradients` maps back to h and the
parameters.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from esper.leyline.base import Contract, canonical_json, content_id
from esper.leyline.blueprint import MAX_JSON_BYTES
from esper.leyline.signature import SiteSignature

FORMAT_VERSION = 1  # Manifest.format
MANIFEST, BLUEPRINT, FORWARD, BACKWARD = MEMBERS = (
    "manifest.json",
    "blueprint.json",
    "forward.so",
    "backward.so",
)
CUBIN_MEMBERS = (MANIFEST, BLUEPRINT, "plan.json", "kernels.cubin")
PLAN, CUBINS = CUBIN_MEMBERS[2:]
LAYOUTS = (MEMBERS, CUBIN_MEMBERS)
MAX_MANIFEST_BYTES = 1 << 20
MAX_LIBRARY_BYTES = 256 << 20
MAX_PLAN_BYTES = 1 << 20
MAX_CUBINS_BYTES = 64 << 20
CAPS = {
    MANIFEST: MAX_MANIFEST_BYTES, BLUEPRINT: MAX_JSON_BYTES, FORWARD: MAX_LIBRARY_BYTES,
    BACKWARD: MAX_LIBRARY_BYTES, PLAN: MAX_PLAN_BYTES, CUBINS: MAX_CUBINS_BYTES,
}
"""Of every member, in bytes."""


class Pipeline(StrEnum):
    """How much compile time is spent on a kernel."""

    FAST = "FAST"
    STANDARD = "STANDARD"
    AGGRESSIVE = "AGGRESSIVE"


class Toolchain(Contract):
    """What a kernel was built with. A kernel runs only on the torch build and ISA it names.

    `torch` is `torch.__version__`; `isa` is torch's CPU capability at build time for a CPU
    kernel ("AVX512", "AVX2", ...) or the arch ("sm_90") for a CUDA kernel; `compiler` names all
    that compiled, and so tells one backend's kernels from another's.
    """

    torch: str
    isa: str
    compiler: str
    esper: str


class Runtime(Contract):
    """What a machine can run: kernels of its torch build, for one of its `isas`, which are
    torch's CPU capability and, where there is a GPU, its arch, as `Toolchain.isa` names them.
    """

    torch: str
    isas: tuple[str, ...] = Field(min_length=1)


class ParameterSpec(Contract):
    name: str
    shape: tuple[int, ...]


class Manifest(Contract):
    """What must be known to open and call a kernel.

    `backward_inputs` lists where each input of backward comes from: "in:0" is h, "in:1"
    alpha, "in:2" on the parameters, "out:K" the K-th output of forward, "grad" the
    (contiguous) gradient of out. `gradients` has one entry for h and one per parameter: the
    index among backward's outputs. `sha256` holds the digest of every other member.
    """

    format: Literal[1] = 1
    kernel_id: str
    blueprint_id: str
    signature: SiteSignature
    pipeline: Pipeline
    toolchain: Toolchain
    parameters: tuple[ParameterSpec, ...]
    backward_inputs: tuple[str, ...]
    gradients: tuple[int, ...]
    sha256: dict[str, str]
    compile_seconds: float = Field(ge=0)
    flops: int = Field(ge=0)  # one forward pass of one sample at space 8


def kernel_id(
    blueprint_id: str, signature: SiteSignature, toolchain: Toolchain, pipeline: Pipeline
) -> str:
    """Hash of all that decides what the compiled code is."""
    return content_id(
        "k",
        canonical_json(
            [
                blueprint_id,
                signature.model_dump(mode="json"),
                toolchain.model_dump(mode="json"),
                pipeline,
            ]
        ),
    )
