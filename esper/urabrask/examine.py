"""The examination of one opened kernel: a proof, and a measurement.

Each of the two is made in a fresh process (see `child`): what a kernel, or the proof's own
poison, has done to the first is no part of what the second measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import Measurement, ValidationReport
from esper.urabrask import bench, conduct
from esper.urabrask.clock import clock
from esper.urabrask.drift import drift
from esper.urabrask.machine import cost, hardware, roofline
from esper.urabrask.memory import peak_bytes
from esper.urabrask.oracle import Problem, reference_kernel
from esper.urabrask.plan import QUICK, Plan
from esper.urabrask.proof import prove
from esper.urabrask.sides import Side, compiled_kernel, problems

# A kernel may trade memory for speed, but a site that fits in memory in eager must still fit.
MEMORY_BUDGET = 2.0  # of eager's peak in the same step
# Peaks of small steps are made of roundings and scalars; below this nobody runs out.
MEMORY_FLOOR_BYTES = 1 << 20


@dataclass(frozen=True)
class Subject:
    """The kernel that is examined. `stage` is told what happens next, so that whoever watches
    knows where a crash came from."""

    kernel_id: str
    kernel: Kernel
    ir: BlueprintIR
    signature: SiteSignature
    stage: Callable[[str], None] = lambda _: None


def prove_only(subject: Subject, folder: Path | None = None) -> ValidationReport:
    """The first stage: is it right, does it behave? Nothing is measured."""
    start = clock()
    subject.stage("the proof")
    proof = prove(subject.kernel, subject.ir, subject.signature, folder=folder)
    return ValidationReport(
        kernel_id=subject.kernel_id,
        accepted=proof.accepted,
        reason=proof.reason,
        proof=proof.cases,
        hardware=hardware(subject.signature.device),
        seconds=clock() - start,
    )


def measure_only(subject: Subject, plan: Plan = QUICK) -> ValidationReport:
    """The second stage: memory, speed, drift. Refuses what it cannot believe or afford."""
    start = clock()
    device = subject.signature.device
    shapes = plan.shapes(subject.signature)
    found: list[Measurement] = []
    reason = ""
    for batch, space in shapes:
        subject.stage(f"the measurement at batch {batch}, space {space}")
        measured, reason = _measure(subject, batch, space, plan)
        found.append(measured)
        if reason:
            break
    subject.stage("the measurement of drift")
    drifted = () if reason else drift(subject.kernel, subject.ir, subject.signature)
    last = found[-1]
    return ValidationReport(
        kernel_id=subject.kernel_id,
        accepted=not reason,
        reason=reason,
        measurements=tuple(found),
        hardware=hardware(device),
        peak_memory_bytes=last.peak_bytes,
        eager_peak_memory_bytes=last.eager_peak_bytes,
        # After the kernel was timed, so that the machine is as warm as it was for the kernel.
        roofline=roofline(str(subject.signature.dtype)) if device == "cpu" else None,
        drift=drifted,
        seconds=clock() - start,
    )


def _measure(
    subject: Subject, batch: int, space: int, plan: Plan
) -> tuple[Measurement, str]:
    ir, signature = subject.ir, subject.signature
    given = problems(ir, signature, batch, space)
    kernel = Side(subject.kernel, given)
    eager = Side(reference_kernel(ir, signature), given)
    compiled, note = _compiled(subject, given) if plan.thorough else (None, "")
    sides = [kernel, eager] + ([compiled] if compiled is not None else [])
    settings = conduct.settings()  # before the kernel's first call
    # Absent on other devices: the counter sees the CPU's allocator only.
    on_cpu = signature.device == "cpu"
    peaks = [peak_bytes(side) if on_cpu else None for side in (kernel, eager)]

    def refresh() -> None:
        for side in sides:
            side.refresh()

    timed = bench.compare(*sides, budget_seconds=plan.seconds, before=refresh)
    wrong = kernel.objection(ir, signature)
    forward, backward, objection = bench.halves(
        kernel, eager, compiled, calls=plan.calls, budget_seconds=plan.seconds / 2
    )
    measured = Measurement(
        batch=batch,
        space=space,
        speedup=timed.ratio,
        low=timed.low,
        high=timed.high,
        verdict=timed.verdict,
        kernel_seconds=timed.kernel,
        eager_seconds=timed.eager,
        compiled_seconds=timed.others[0] if timed.others else (),
        stopped=timed.stopped,
        forward=forward,
        backward=backward,
        cost=cost(ir, signature, batch, space),
        peak_bytes=peaks[0],
        eager_peak_bytes=peaks[1],
        note=note,
    )
    if wrong:
        return measured, f"while it was timed the kernel did not do its work: {wrong}"
    if objection := timed.objection or objection:
        return measured, f"the measurement cannot be believed: {objection}"
    if changed := conduct.changed(settings, conduct.settings()):
        return measured, changed
    return measured, _over_budget(*peaks)


def _compiled(subject: Subject, given: tuple[Problem, ...]) -> tuple[Side | None, str]:
    """torch.compile's side, compiled for this shape; without it, why there is none."""
    side = Side(compiled_kernel(subject.ir, subject.signature), given)
    try:
        side()
    except Exception as e:  # it may fail in any way, and that says nothing of the kernel
        return None, f"torch.compile failed: {type(e).__name__}: {str(e)[:300]}"
    return side, ""


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
