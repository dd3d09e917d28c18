"""Who descends from what, what each family has earned, and what it has on offer.

A family is all that descends, by first parents, from one blueprint that somebody wrote: a template,
as a rule. What a family offers is what a trainer has or may yet have: a kernel that is VALIDATED or
on its way there, or a blueprint that still becomes one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from esper.leyline.command import FieldReport
from esper.leyline.evidence import Earned, earned, worths_of
from esper.leyline.library import BlueprintRecord, KernelRecord, Library
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature

AT_DISPOSAL = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.BENCHMARKING,
               KernelStatus.VALIDATED)
ON_THE_WAY = (BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING)
SPEED_COUNTS = 0.01  # what a kernel twice as fast is worth, in shares of the loss, is 0.7 of it


def founder(blueprint_id: str, parents: Mapping[str, Sequence[str]]) -> str:
    """The first of the line. A line that runs in a circle ends where it would close."""
    seen = {blueprint_id}
    while (above := parents.get(blueprint_id)) and above[0] not in seen:
        blueprint_id = above[0]
        seen.add(blueprint_id)
    return blueprint_id


@dataclass(frozen=True)
class Family:
    """Members for one signature, oldest first. `earned` is over the reports of all of them."""

    founder: str
    name: str
    members: tuple[BlueprintRecord, ...]
    offered: frozenset[str]  # ids of members at a trainer's disposal, now or soon
    earned: Earned


@dataclass(frozen=True)
class Stock:
    """All blueprints for one signature. `evidence` and `speeds` are by blueprint; `untried` are
    those on offer of which no report has come."""

    signature: SiteSignature
    blueprints: tuple[BlueprintRecord, ...]
    families: tuple[Family, ...]
    untried: frozenset[str]
    evidence: Mapping[str, Earned]
    speeds: Mapping[str, float] = field(default_factory=dict)

    @property
    def offered(self) -> frozenset[str]:
        return frozenset().union(*(f.offered for f in self.families))

    def promise(self, blueprint_id: str) -> float:
        """What a blueprint can be relied on to earn or to cost: the end next to zero of what field
        reports leave open, and a little for speed. As long as zero is in between nothing is
        known of it, whether one lucky report speaks for it or none."""
        known = self.evidence.get(blueprint_id) or earned(())
        speed = self.speeds.get(blueprint_id)
        sure = known.low if known.low > 0 else min(0.0, known.high)
        return sure + (SPEED_COUNTS * math.log(speed) if speed else 0.0)

    @property
    def best(self) -> BlueprintRecord | None:
        """Who has earned most, of those that can be relied on if there are any; None where
        nothing was ever reported."""
        tried = [b for b in self.blueprints if b.blueprint_id in self.evidence]
        return max(tried, default=None, key=lambda b: (
            self.evidence[b.blueprint_id].low > 0, self.evidence[b.blueprint_id].mean))

    def line_of(self, record: BlueprintRecord) -> list[BlueprintRecord]:
        """From the founder of its family down to it, by first parents."""
        by_id = {b.blueprint_id: b for b in self.blueprints}
        line = [record]
        while (above := line[-1].parents) and (up := by_id.get(above[0])) and up not in line:
            line.append(up)
        return line[::-1]


def stock_of(
    signature: SiteSignature, known: Sequence[BlueprintRecord], kernels: Sequence[KernelRecord],
    reports: Iterable[FieldReport],
) -> Stock:
    """`known` and `kernels` are those for `signature`. Reports count wherever a blueprint was
    tried."""
    reports = list(reports)
    parents = {b.blueprint_id: b.parents for b in known}
    tried = {r.kernel_id for r in reports}
    worths = worths_of(reports)
    offered = {b.blueprint_id for b in known if b.status in ON_THE_WAY}
    offered |= {k.blueprint_id for k in kernels if k.status in AT_DISPOSAL}
    offered &= parents.keys()
    lines: dict[str, list[BlueprintRecord]] = defaultdict(list)
    for b in sorted(known, key=lambda b: b.submitted):
        lines[founder(b.blueprint_id, parents)].append(b)
    called = {b.blueprint_id: b.ir.name for b in known}
    families = tuple(
        Family(
            first, called.get(first) or "unnamed", tuple(members),
            frozenset(m.blueprint_id for m in members) & offered,
            earned([w for m in members for w in worths.get(m.blueprint_id, ())]))
        for first, members in lines.items())
    speeds = {k.blueprint_id: k.report.speedup for k in reversed(kernels)
              if k.report is not None and k.report.speedup is not None}
    return Stock(
        signature, tuple(known), families,
        frozenset(offered - {k.blueprint_id for k in kernels if k.kernel_id in tried}),
        {b: earned(w) for b, w in worths.items()}, speeds)


def stocks(library: Library) -> list[Stock]:
    """One for each signature that the library knows, oldest first."""
    reports = library.reports()
    return [stock_of(s, library.blueprints(s), library.kernels(signature=s), reports)
            for s in library.signatures()]
