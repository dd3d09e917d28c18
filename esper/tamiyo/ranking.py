"""The default chooser: where most is to be gained, what has the best record in the field."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.leyline.evidence import field_evidence
from esper.tamiyo.choice import Candidate
from esper.tamiyo.state import Catalog, SystemState

HOPE = 0.05  # of the loss: the least that is expected of what nobody has tried


class FieldRanking:
    """Sites in the order of their scores, those without one last. Of the kernels for a site the
    one whose blueprint has the best mean gain, untried ones taking an optimistic prior (the best
    mean there is), faster ones preferred among equals."""

    version = "heuristic"

    def values(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Sequence[tuple[float, str]]:
        means = {b: known.observed for b, known in field_evidence(catalog.reports).items()
                 if known.observed is not None}
        prior = max([HOPE, *means.values()])
        scores = {c.site.name: c.site.score for c in candidates}
        steps = sorted({-math.inf if s is None else s for s in scores.values()})
        rank = {name: steps.index(-math.inf if s is None else s) for name, s in scores.items()}
        known: dict[str, tuple[float, str]] = {}
        found = []
        for candidate in candidates:
            kernel = candidate.kernel
            if kernel.kernel_id not in known:
                mean = means.get(kernel.blueprint_id)
                speed = kernel.report.speedup if kernel.report is not None else None
                value = (prior if mean is None else mean) + 0.01 * math.log(speed or 1.0)
                record = ("untried" if mean is None
                          else f"mean gain {mean:+.3g} of the loss in the field")
                fast = "unmeasured speed" if speed is None else f"{speed:.2f} times eager"
                # Below one half either way: a site's rank is never outdone by a kernel.
                known[kernel.kernel_id] = 0.49 * value / (1 + abs(value)), f"{record}, {fast}"
            share, why = known[kernel.kernel_id]
            found.append((rank[candidate.site.name] + share, why))
        return found
