"""Tags: what a kernel is good at, each with its figure and where it was measured.

A tag is a claim that Tamiyo chooses by, so each is a rule on a measurement, and what was not
measured earns no tag. The rules are fixed; once `ENOUGH` validated kernels of the same
signature have the figure from the same hardware, a kernel must also be among the best
quarter of them, itself included. A tag keeps the evidence of its day: later peers do not
take it away.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.leyline.artifact import Manifest
from esper.leyline.verdict import Hardware, SpeedVerdict, Tag, ValidationReport

ENOUGH = 8  # peers, before "the best quarter" means anything
LOW_MEMORY = 0.8  # of eager's peak
# No further from the truth than eager on any input; 2 would be allowed.
PRECISE = 1.0
STABLE = 1.25

Measured = tuple[Manifest, ValidationReport]


@dataclass(frozen=True)
class Rule:
    """`figure` is None where it was not measured; `holds` is the fixed rule."""

    name: str
    figure: Callable[[Measured], float | None]
    holds: Callable[[Measured, float], bool]
    words: Callable[[Measured, float], str]
    more_is_better: bool = False


def slowest_bound(measured: Measured) -> float | None:
    """The lowest 95 % bound of the speedup over all shapes."""
    return min((m.low for m in measured[1].measurements), default=None)


def memory_ratio(measured: Measured) -> float | None:
    """The kernel's peak over eager's, at the largest shape."""
    report = measured[1]
    if report.peak_memory_bytes is None or not report.eager_peak_memory_bytes:
        return None
    return report.peak_memory_bytes / report.eager_peak_memory_bytes


def parameter_count(manifest: Manifest) -> int:
    total = 0
    for p in manifest.parameters:
        n = 1
        for extent in p.shape:
            n *= extent
        total += n
    return total


def worst_ratio(measured: Measured) -> float | None:
    """The largest error of any case of the proof, in units of eager's own and its floor."""
    return max((c.worst_ratio for c in measured[1].proof), default=None)


def stress_ratio(measured: Measured) -> float | None:
    """The same among the inputs of very small and very large magnitude."""
    ratios = [c.worst_ratio for c in measured[1].proof if "magnitude " in c.name]
    return max(ratios, default=None)


def _all_fast(measured: Measured, _: float) -> bool:
    return all(m.verdict is SpeedVerdict.FAST for m in measured[1].measurements)


def _speed_words(measured: Measured, lowest: float) -> str:
    shapes = ", ".join(
        f"{m.batch}x{m.space}: {m.speedup:.2f}" for m in measured[1].measurements
    )
    return (
        f"eager's time over the kernel's, forward and backward, is {shapes}; the lowest 95 % "
        f"bound is {lowest:.3f}"
    )


def _memory_words(measured: Measured, _: float) -> str:
    report = measured[1]
    return (
        f"a step holds {report.peak_memory_bytes} bytes of tensors at its peak, eager "
        f"{report.eager_peak_memory_bytes}"
    )


def _dense(manifest: Manifest) -> int:
    return manifest.signature.channels**2


RULES = (
    Rule("high_speed", slowest_bound, _all_fast, _speed_words, more_is_better=True),
    Rule("low_memory", memory_ratio, lambda _, ratio: ratio <= LOW_MEMORY, _memory_words),
    Rule(
        "few_parameters",
        lambda m: float(parameter_count(m[0])),
        lambda m, count: count <= _dense(m[0]),
        lambda m, count: f"{count:.0f} parameters, one dense layer at this site has {_dense(m[0])}",
    ),
    Rule(
        "numerically_stable", stress_ratio, lambda _, ratio: ratio <= STABLE,
        lambda _, ratio: f"on very small and very large inputs its error is {ratio:.2f} times "
        "eager's own and its floor",
    ),
    Rule(
        "high_precision", worst_ratio, lambda _, ratio: ratio <= PRECISE,
        lambda m, ratio: f"over {len(m[1].proof)} cases its error is at most {ratio:.2f} times "
        "eager's own and its floor",
    ),
)


def tags(
    manifest: Manifest, report: ValidationReport, peers: Sequence[Measured] = ()
) -> tuple[Tag, ...]:
    """The tags that an accepted kernel earns beside `peers`.

    Of these only those of the same signature and hardware count.
    """
    own = manifest, report
    if report.hardware is None:
        return ()
    near = [
        peer for peer in peers
        if peer[0].signature == manifest.signature and peer[1].hardware == report.hardware
        and peer[0].kernel_id != manifest.kernel_id
    ]
    made = []
    for rule in RULES:
        figure = rule.figure(own)
        if figure is None or not rule.holds(own, figure):
            continue
        among, standing = _among_the_best(rule, figure, near)
        if among:
            evidence = f"{rule.words(own, figure)}; {standing}{_on(report.hardware)}"
            made.append(Tag(name=rule.name, value=figure, evidence=evidence))
    return tuple(made)


def _among_the_best(
    rule: Rule, figure: float, peers: Sequence[Measured]
) -> tuple[bool, str]:
    known = [f for peer in peers if (f := rule.figure(peer)) is not None]
    if len(known) < ENOUGH:
        return True, ""
    quarters = statistics.quantiles([*known, figure], n=4, method="inclusive")
    limit = quarters[2] if rule.more_is_better else quarters[0]
    among = figure >= limit if rule.more_is_better else figure <= limit
    side = "from" if rule.more_is_better else "up to"
    return among, f"the best quarter of {len(known)} peers and itself goes {side} {limit:.4g}; "


def _on(where: Hardware) -> str:
    return f"on {where.cpu}, {where.isa}, {where.threads} thread(s)"
