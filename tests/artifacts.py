"""Artifacts put together by hand, sound and unsound, apart from the code that packs real ones."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from esper.leyline.artifact import (
    MANIFEST,
    Manifest,
    ParameterSpec,
    Pipeline,
    Toolchain,
    kernel_id,
)
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature


def members(
    ir: BlueprintIR,
    site: SiteSignature,
    code: Mapping[str, bytes],
    *,
    torch_build: str | None = None, isa: str | None = None, **changes: Any
) -> dict[str, bytes]:
    toolchain = Toolchain(
        torch=torch_build or torch.__version__,
        isa=isa or torch.backends.cpu.get_cpu_capability(),
        compiler="g++ 12",
        esper="0",
    )
    parameters = tuple(
        ParameterSpec(name=p.name, shape=p.shape) for p in infer(ir, site).parameters
    )
    inputs = 2 + len(parameters)  # h, alpha and the parameters
    made = {"blueprint.json": ir.to_json().encode(), **code}
    fields: dict[str, Any] = {
        "kernel_id": kernel_id(ir.id, site, toolchain, Pipeline.FAST),
        "blueprint_id": ir.id,
        "signature": site,
        "pipeline": Pipeline.FAST,
        "toolchain": toolchain,
        "parameters": parameters,
        "backward_inputs": (*(f"in:{i}" for i in range(inputs)), "grad"),
        "gradients": tuple(range(inputs - 1)),
        "sha256": {name: sha256(content) for name, content in made.items()},
        "compile_seconds": 1.0,
        "flops": 1,
    }
    manifest = Manifest(**{**fields, **changes})
    return {MANIFEST: manifest.model_dump_json().encode(), **made}


def pack(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return buffer.getvalue()
