"""What is known of a choice before it is made, as numbers: the same for a decision and a report.

`context_of` is what a field report keeps of it. `Columns` makes the inputs of a linear model: 18
features, an indicator for each that may be missing, and products of what the site and the moment
are like with what the kernel is like, for without them the best kernel would be the same
everywhere. What is missing takes the mean of the reports that the columns were fitted on, and its
indicator says so; zero it is never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.leyline.base import Contract
from esper.leyline.command import Command, SeedContext
from esper.leyline.evidence import Earned, field_evidence
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.state import Catalog, SiteStatus, SystemState

Matrix = npt.NDArray[np.float64]
Known = Mapping[str, Any]  # fields of a SeedContext, as far as they are known

OF_SITE = ("tokens", "map", "log_channels", "depth", "relative_score", "fossils")
OF_MOMENT = ("log_epoch", "growths", "loss_share")
OF_KERNEL = ("log_parameters", "log_flops", "log_speedup", "layers", "log_width", "log_taps")
IN_THE_FIELD = ("log_tried", "untried", "earned")
FEATURES = (*OF_SITE, *OF_MOMENT, *OF_KERNEL, *IN_THE_FIELD)
# What a policy has to go by that looks at no site and at no kernel, only at how blueprints fared.
PLAIN = (*OF_MOMENT, *IN_THE_FIELD)
_PRODUCTS = tuple(
    (a, b) for a in ("tokens", "map", "depth", "relative_score", "loss_share")
    for b in ("log_parameters", "layers", "log_width", "log_taps"))


# Facts


def moment_facts(state: SystemState) -> dict[str, Any]:
    """Fields of a SeedContext that all candidates of a moment share."""
    losses = state.holdout_losses
    share = losses[-1] / losses[0] if losses and losses[0] else None
    return {"epoch": state.epoch, "growths": state.growths,
            "loss_share": share if share is not None and math.isfinite(share) else None}


def site_facts(site: SiteStatus, state: SystemState) -> dict[str, Any]:
    """Fields that all candidates at one site share."""
    names = [s.name for s in state.sites]
    scores = [s.score for s in state.sites
              if s.state is SeedState.DORMANT and s.score is not None and math.isfinite(s.score)]
    largest = max(scores, default=0.0)
    known = site.score is not None and math.isfinite(site.score) and largest > 0
    return {
        "site": site.signature,
        "depth": names.index(site.name) / (len(names) - 1) if len(names) > 1 else None,
        "relative_score": site.score / largest if known and site.score is not None else None,
        "fossils": site.fossils,
    }


def kernel_facts(kernel: KernelRecord) -> dict[str, Any]:
    """Fields that say what a kernel is like."""
    shapes = [p.shape for p in kernel.manifest.parameters]
    weights = [s for s in shapes if len(s) > 1]
    channels = kernel.manifest.signature.channels
    return {
        "parameters": sum(math.prod(s) for s in shapes),
        "flops": kernel.manifest.flops,
        "speedup": kernel.report.speedup if kernel.report is not None else None,
        "layers": len(weights),
        "width": max(s[0] for s in weights) / channels if weights else None,
        "taps": max(math.prod(s[2:]) for s in weights) if weights else None,
    }


def field_facts(known: Earned | None) -> dict[str, Any]:
    """Fields that say how a blueprint fared so far."""
    return {"tried": known.reports if known else 0, "earned": known.mean if known else None}


def context_of(
    command: Command, state: SystemState, catalog: Catalog, policy: object
) -> SeedContext | None:
    """The context of a germination that `policy` commands; None where the site or the kernel is
    not among what it saw. A policy that has versions says so by an attribute `version`."""
    site = next((s for s in state.sites if s.name == command.site), None)
    kernel = next((k for k in catalog.kernels if k.kernel_id == command.kernel_id), None)
    if site is None or kernel is None:
        return None
    evidence = field_evidence(
        r for r in catalog.reports if r.blueprint_id == kernel.blueprint_id)
    return SeedContext(
        policy=getattr(policy, "version", None), **moment_facts(state),
        **site_facts(site, state), **kernel_facts(kernel),
        **field_facts(evidence.get(kernel.blueprint_id)))


# Numbers

_MISSING = math.nan


def _number(value: Any) -> float:
    return _MISSING if value is None else float(value)


def _log(value: Any) -> float:
    return _MISSING if value is None else math.log1p(value)


def _log_ratio(value: Any) -> float:
    """Of a ratio: zero where it is one. Zero of something is no ratio."""
    return math.log(value) if value else _MISSING


def site_numbers(known: Known) -> tuple[float, ...]:
    """In the order of `OF_SITE`."""
    site: SiteSignature | None = known.get("site")
    if site is None:
        shape = (_MISSING, _MISSING, _MISSING)
    else:
        shape = (float(site.kind is SiteKind.TOKENS), float(site.kind is SiteKind.MAP),
                 math.log(site.channels))
    return (*shape, _number(known.get("depth")), _number(known.get("relative_score")),
            _number(known.get("fossils")))


def moment_numbers(known: Known) -> tuple[float, ...]:
    """In the order of `OF_MOMENT`."""
    return (_log(known.get("epoch")), _number(known.get("growths")),
            _number(known.get("loss_share")))


def kernel_numbers(known: Known) -> tuple[float, ...]:
    """In the order of `OF_KERNEL`."""
    return (_log(known.get("parameters")), _log(known.get("flops")),
            _log_ratio(known.get("speedup")), _number(known.get("layers")),
            _log_ratio(known.get("width")), _log_ratio(known.get("taps")))


def field_numbers(known: Known) -> tuple[float, ...]:
    """In the order of `IN_THE_FIELD`."""
    tried = known.get("tried")
    untried = _MISSING if tried is None else float(not tried)
    return _log(tried), untried, _number(known.get("earned"))


def numbers(known: Known) -> tuple[float, ...]:
    """One row of features, in the order of `FEATURES`; NaN is missing."""
    return (*site_numbers(known), *moment_numbers(known), *kernel_numbers(known),
            *field_numbers(known))


def table(rows: Iterable[Sequence[float]]) -> Matrix:
    """[n, len(FEATURES)] of rows as `numbers` makes them."""
    made = np.array(list(rows), dtype=np.float64)
    return made.reshape(-1, len(FEATURES))


# Columns


class Columns(Contract):
    """How rows of features become inputs of a linear model: which are used, what they are centred
    on and divided by, and which of them were ever missing. One column each, then the indicators,
    then the products."""

    used: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    lacking: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.used) + len(self.lacking) + len(self._products())

    def _products(self) -> list[tuple[int, int]]:
        place = {name: i for i, name in enumerate(self.used)}
        return [(place[a], place[b]) for a, b in _PRODUCTS if a in place and b in place]

    def __call__(self, rows: Matrix) -> Matrix:
        """[n, len(FEATURES)] -> [n, size]."""
        taken = rows[:, [FEATURES.index(name) for name in self.used]]
        missing = np.isnan(taken)
        centred = np.where(missing, 0.0, (taken - np.array(self.mean)) / np.array(self.scale))
        places = {name: i for i, name in enumerate(self.used)}
        gaps = missing[:, [places[name] for name in self.lacking]].astype(np.float64)
        pairs = self._products()
        left, right = [a for a, _ in pairs], [b for _, b in pairs]
        return np.hstack([centred, gaps, centred[:, left] * centred[:, right]])


def fit_columns(rows: Matrix, used: tuple[str, ...] = FEATURES) -> Columns:
    """Columns for rows like these. A feature that is the same in all of them, or known in none,
    is left as it is: the model then knows nothing of it, and says so by its width."""
    taken = rows[:, [FEATURES.index(name) for name in used]]
    known = ~np.isnan(taken)
    count = known.sum(axis=0)
    filled = np.where(known, taken, 0.0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(known, taken - mean, 0.0) ** 2).sum(axis=0) / np.maximum(count, 1))
    return Columns(
        used=used, mean=tuple(mean.tolist()),
        scale=tuple(np.where(spread > 1e-9, spread, 1.0).tolist()),
        lacking=tuple(n for n, c in zip(used, count, strict=True) if c < len(rows)),
    )
