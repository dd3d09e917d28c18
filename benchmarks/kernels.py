"""Sites for the benchmarks, and real kernels, through the real library and the real prover."""

from __future__ import annotations

import threading
from pathlib import Path

from esper.karn.templates import templates_for
from esper.leyline.artifact import Pipeline
from esper.leyline.library import KernelRecord, Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.compile import compile_artifact
from esper.urabrask import service as urabrask
from esper.urza.library import LocalLibrary

FEATURES = SiteSignature(kind=SiteKind.FEATURES, channels=64)
TOKENS = SiteSignature(kind=SiteKind.TOKENS, channels=64)
MAP = SiteSignature(kind=SiteKind.MAP, channels=32)


def validated_library(
    root: Path, signature: SiteSignature, template: int = 0
) -> tuple[Library, KernelRecord]:
    """A library with one VALIDATED kernel for `signature`, compiled and proved here."""
    library = LocalLibrary(root)
    library.register_signature(signature)
    ir = templates_for(signature)[template]
    library.submit(ir, signature, author="benchmark")
    claim = library.claim_blueprint("benchmark", lease_seconds=300)
    assert claim is not None
    library.complete_blueprint(claim, compile_artifact(ir, signature, pipeline=Pipeline.FAST))
    urabrask.run(library, threading.Event(), worker_name="benchmark", once=True)
    (kernel,) = library.kernels(signature=signature, status=KernelStatus.VALIDATED)
    return library, kernel
