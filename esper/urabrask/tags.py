"""Tags: what a kernel is good at, each with its figure and where it was measured.

A tag is a claim that Tamiyo chooses by, so each rule is a threshold on a measurement, and
what was not measured earns no tag.
"""

from __future__ import annotations

from collections.abc import Sequence

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import Hardware, Measurement, SpeedVerdict, Tag
from esper.urabrask.proof import Proof, stress_ratio

LOW_MEMORY = 0.8  # of eager's peak
# No further from the truth than eager on any input; 2 would be allowed.
PRECISE = 1.0
STABLE = 1.25


def tags(
    ir: BlueprintIR,
    signature: SiteSignature,
    proof: Proof,
    measurements: Sequence[Measurement],
    memory: tuple[int | None, int | None],
    where: Hardware,
) -> tuple[Tag, ...]:
    """The tags a proven kernel earns. `memory` is (kernel's peak, eager's peak) in bytes."""
    on = f"on {where.cpu}, {where.isa}, {where.threads} thread(s)"
    made: list[Tag] = []

    if measurements and all(m.verdict is SpeedVerdict.FAST for m in measurements):
        lowest = min(m.low for m in measurements)
        shapes = ", ".join(f"{m.batch}x{m.space}: {m.speedup:.2f}" for m in measurements)
        made.append(
            Tag(
                name="high_speed",
                value=lowest,
                evidence=f"eager's time over the kernel's, forward and backward, is {shapes}; "
                f"the lowest 95 % bound is {lowest:.3f}; {on}",
            )
        )

    kernel_peak, eager_peak = memory
    if kernel_peak is not None and eager_peak and kernel_peak <= LOW_MEMORY * eager_peak:
        made.append(
            Tag(
                name="low_memory",
                value=kernel_peak / eager_peak,
                evidence=f"a step holds {kernel_peak} bytes of tensors at its peak, eager "
                f"{eager_peak}; {on}",
            )
        )

    count, dense = infer(ir, signature).parameter_count, signature.channels**2
    if count <= dense:
        made.append(
            Tag(
                name="few_parameters",
                value=float(count),
                evidence=f"{count} parameters, one dense layer at this site has {dense}",
            )
        )

    stress = stress_ratio(proof, signature)
    if stress <= STABLE:
        made.append(
            Tag(
                name="numerically_stable",
                value=stress,
                evidence=f"on very small and very large inputs its error is {stress:.2f} "
                f"times eager's own and its floor; {on}",
            )
        )
    worst = max((c.worst_ratio for c in proof.cases), default=float("inf"))
    if worst <= PRECISE:
        made.append(
            Tag(
                name="high_precision",
                value=worst,
                evidence=f"over {len(proof.cases)} cases its error is at most {worst:.2f} times "
                f"eager's own and its floor; {on}",
            )
        )
    return tuple(made)
