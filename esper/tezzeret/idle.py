"""What to compile when nothing new waits: the three tiers of recompilation.

Tier 1 gives kernels that somebody waits for the AGGRESSIVE pipeline, tier 2 gives blueprints
whose kernel failed validation of late another chance as STANDARD, tier 3 renews FAST what only
an outdated toolchain has compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from esper.leyline.artifact import Pipeline, Toolchain, kernel_id
from esper.leyline.library import (
    HIGH_INTEREST,
    BlueprintClaim,
    BlueprintRecord,
    KernelRecord,
    Library,
)
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus

RECENT_SECONDS = 24 * 3600.0

Tools = Callable[[BlueprintRecord], Toolchain | None]
"""What a kernel of a record would be built with here; None where it cannot be compiled here."""


def candidates(
    library: Library, tools: Tools, now: float
) -> Iterator[tuple[BlueprintRecord, Pipeline, str]]:
    """Recompilations worth doing, best first, each with the id its kernel will have.

    Kernels that the library has, in whatever status, are never compiled a second time.
    """
    kernels: dict[tuple[str, str], list[KernelRecord]] = {}
    for kernel in library.kernels():
        key = (kernel.blueprint_id, kernel.manifest.signature.id)
        kernels.setdefault(key, []).append(kernel)
    compiled = [
        (b, kernels[b.blueprint_id, b.signature.id]) for b in library.blueprints()
        if b.status is BlueprintStatus.COMPILED and (b.blueprint_id, b.signature.id) in kernels
    ]
    built_with = {(b.blueprint_id, b.signature.id): tools(b) for b, _ in compiled}

    def failed(known: list[KernelRecord]) -> bool:
        return any(
            k.status is KernelStatus.REJECTED and now - k.updated < RECENT_SECONDS for k in known
        )

    def outdated(known: list[KernelRecord]) -> bool:
        now_here = built_with[known[0].blueprint_id, known[0].manifest.signature.id]
        return all(k.manifest.toolchain != now_here for k in known)

    compiled.sort(key=lambda c: -c[0].interest)
    tiers = (
        (Pipeline.AGGRESSIVE, [b for b, _ in compiled if b.interest > HIGH_INTEREST]),
        (Pipeline.STANDARD, [b for b, known in compiled if failed(known)]),
        (Pipeline.FAST, [b for b, known in compiled if outdated(known)]),
    )
    there = {k.kernel_id for known in kernels.values() for k in known}
    for pipeline, records in tiers:
        for record in records:
            made = built_with[record.blueprint_id, record.signature.id]
            if made is None:
                continue
            identity = kernel_id(record.blueprint_id, record.signature, made, pipeline)
            if identity not in there:
                yield record, pipeline, identity


def claim_idle_work(
    library: Library, worker: str, lease_seconds: float, tools: Tools, tried: set[str]
) -> BlueprintClaim | None:
    """Lease the best recompilation, None where there is none.

    `tried` collects the kernel ids that were handed out, so that one that cannot be compiled
    is not tried again for as long as the service lives.
    """
    for record, pipeline, identity in candidates(library, tools, time.time()):
        if identity in tried:
            continue
        claim = library.claim_recompilation(
            record.blueprint_id, record.signature, worker, lease_seconds, pipeline
        )
        if claim is not None:
            tried.add(identity)
            return claim
    return None
