"""The whole examination of one opened kernel: proof, measurement, memory, tags, verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.urabrask import bench
from esper.urabrask.oracle import reference_kernel
from esper.urabrask.problems import draw, typical
from esper.urabrask.proof import prove
from esper.urabrask.tags import tags

# A kernel may trade memory for speed, but a site that fits in memory in eager must still fit.
MEMORY_BUDGET = 2.0  # of eager's peak in the same step
# Peaks of small steps are made of roundings and scalars; below this nobody runs out.
MEMORY_FLOOR_BYTES = 1 << 20


def examine(
    kernel_id: str,
    kernel: Kernel,
    ir: BlueprintIR,
    signature: SiteSignature,
    *,
    bench_seconds: float = 2.0,
    folder: Path | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> ValidationReport:
    """Prove, then measure. `bench_seconds` is the budget per measured shape.

    `stage` is told what happens next, so that whoever watches knows where a crash came from.
    """
    start = time.perf_counter()
    stage("the proof")
    proof = prove(kernel, ir, signature, folder=folder)
    where = bench.hardware(signature.device)
    if not proof.accepted:
        return ValidationReport(
            kernel_id=kernel_id,
            accepted=False,
            reason=proof.reason,
            proof=proof.cases,
            hardware=where,
            seconds=time.perf_counter() - start,
        )
    stage("the measurement of memory")
    memory = peaks(kernel, ir, signature)
    stage("the measurement of speed")
    measurements = tuple(
        bench.measure(kernel, ir, signature, batch, space, budget_seconds=bench_seconds)
        for batch, space in bench.shapes(signature)
    )
    reason = _over_budget(*memory)
    return ValidationReport(
        kernel_id=kernel_id,
        accepted=not reason,
        reason=reason,
        proof=proof.cases,
        measurements=measurements,
        tags=tags(ir, signature, proof, measurements, memory, where),
        hardware=where,
        peak_memory_bytes=memory[0],
        seconds=time.perf_counter() - start,
    )


def peaks(
    kernel: Kernel, ir: BlueprintIR, signature: SiteSignature
) -> tuple[int | None, int | None]:
    """Peak tensor bytes of one step at the largest measured shape: (kernel, eager)."""
    if signature.device != "cpu":
        return None, None  # absent: the counter sees the CPU's allocator only
    batch, space = bench.shapes(signature)[-1]
    problem = draw(ir, signature, typical(signature, batch, space, 0.5), seed=0)
    eager = reference_kernel(ir, signature)
    return (
        bench.peak_bytes(bench.step(kernel, problem)),
        bench.peak_bytes(bench.step(eager, problem)),
    )


def _over_budget(kernel_peak: int | None, eager_peak: int | None) -> str:
    if kernel_peak is None or eager_peak is None:
        return ""
    budget = max(MEMORY_BUDGET * eager_peak, MEMORY_FLOOR_BYTES)
    if kernel_peak <= budget:
        return ""
    return (
        f"memory: a step holds {kernel_peak} bytes of tensors at its peak, the budget is "
        f"{budget:.0f} ({MEMORY_BUDGET:g} times eager's {eager_peak})"
    )
