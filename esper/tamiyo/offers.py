"""Which kernels could be grown where: everything that fits, and why the rest does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.leyline.library import KernelRecord
from esper.leyline.signature import SiteSignature
from esper.tamiyo.budgets import Books, Costs
from esper.tamiyo.choice import Candidate
from esper.tamiyo.state import Catalog, Considered, SiteStatus


@dataclass(frozen=True)
class _Offer:
    """What suits one signature and number of positions; such sites share it."""

    fitting: tuple[tuple[KernelRecord, int, int | None], ...]  # with parameters and FLOPs
    refused: tuple[tuple[str, str], ...]  # (kernel id, why)


class Offers:
    """The kernels of `catalog` for each of `sites`, as they fit budgets and tags.

    Looked at once for all sites that are alike: there may be hundreds of kernels and dozens of
    sites. With `again`, a blueprint may be tried at a site a second time.
    """

    def __init__(
        self, sites: Sequence[SiteStatus], catalog: Catalog, books: Books, spent: Costs,
        tags: Sequence[str] = (), again: bool = False,
    ) -> None:
        self.sites, self._again = tuple(sites), again
        self._books, self._catalog = books, catalog
        by_signature: dict[SiteSignature, list[KernelRecord]] = defaultdict(list)
        for kernel in catalog.kernels:
            by_signature[kernel.manifest.signature].append(kernel)
        shared: dict[Any, _Offer] = {}
        self._of: dict[str, _Offer] = {}
        for site in self.sites:
            key = site.signature, site.positions
            if key not in shared:
                shared[key] = self._look(site, by_signature[site.signature], spent, tags)
            self._of[site.name] = shared[key]

    def _look(
        self, site: SiteStatus, kernels: Sequence[KernelRecord], spent: Costs, tags: Sequence[str]
    ) -> _Offer:
        books, graphs = self._books, self._catalog.blueprints
        fitting, refused = [], []
        for kernel in kernels:
            reason = books.refusal(kernel, site, graphs, spent) or _lacking(kernel, tags)
            if reason:
                refused.append((kernel.kernel_id, reason))
            else:
                fitting.append(
                    (kernel, books.parameters(kernel), books.flops(kernel, site, graphs)))
        return _Offer(tuple(fitting), tuple(refused))

    def open(self) -> frozenset[str]:
        """Names of the sites for which there is something."""
        return frozenset(s.name for s in self.sites if any(
            not self._tried(k, s) for k, _, _ in self._of[s.name].fitting))

    def _tried(self, kernel: KernelRecord, site: SiteStatus) -> bool:
        return not self._again and kernel.blueprint_id in site.used_blueprints

    def candidates(self) -> list[Candidate]:
        """Site by site, kernels in the order of the catalog."""
        return [
            Candidate(site, kernel, parameters, flops)
            for site in self.sites for kernel, parameters, flops in self._of[site.name].fitting
            if not self._tried(kernel, site)
        ]

    def refused(self, site: SiteStatus) -> list[Considered]:
        """What is not offered at `site`, and why."""
        offer = self._of[site.name]
        return [Considered(k.kernel_id, site.name, False, "tried here before")
                for k, _, _ in offer.fitting if self._tried(k, site)
                ] + [Considered(k, site.name, False, why) for k, why in offer.refused]


def _lacking(kernel: KernelRecord, tags: Sequence[str]) -> str:
    if not tags:
        return ""
    carried = {t.name for t in kernel.report.tags} if kernel.report is not None else set()
    lacking = [t for t in tags if t not in carried]
    return f"not tagged {', '.join(lacking)}" if lacking else ""


def ranked(
    candidates: Sequence[Candidate], values: Sequence[tuple[float, str]], chosen: int
) -> list[Considered]:
    """What is told of a choice: every kernel for the site that was taken, best first, and the best
    one for each other site."""
    site = candidates[chosen].site.name
    here: list[int] = []
    best: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        at = candidate.site.name
        if at == site:
            here.append(i)
        elif at not in best or values[i][0] > values[best[at]][0]:
            best[at] = i
    here.sort(key=lambda i: (i == chosen, values[i][0]), reverse=True)
    return [Considered(candidates[i].kernel.kernel_id, candidates[i].site.name, i == chosen,
                       values[i][1]) for i in [*here, *best.values()]]
