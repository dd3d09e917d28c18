"""Where and which: what a policy may choose from, and who says how much each choice promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from esper.leyline.library import KernelRecord
from esper.tamiyo.state import Catalog, SiteStatus, SystemState


@dataclass(frozen=True)
class Candidate:
    """A kernel that fits a dormant site and every budget. `flops` are those of one forward pass
    per sample, None where the number of positions is not known."""

    site: SiteStatus
    kernel: KernelRecord
    parameters: int
    flops: int | None


class Chooser(Protocol):
    """Ranks candidates. One that remembers something has `state_dict` and `load_state_dict`; one
    that does not look at the scores of sites says so with `scored = False`, and they are not
    measured for it. `version`, where it has one, is the name that field reports bear."""

    def values(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> Sequence[tuple[float, str]]:
        """(value, reason for people) of each candidate, in their order; the highest is taken, and
        -inf never."""
        ...
