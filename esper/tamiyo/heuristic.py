"""The default policy: grow on a schedule or on a plateau, keep what pays, cull what does not."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from esper.leyline.command import Action, Command
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import Catalog, Considered, Decision, SiteStatus, SystemState

# STABILIZATION: the held-out loss counts as settled when it changed from one epoch to the next by
# no more than a tenth of itself, or than three times what this run's usually does; and how many
# more epochs a seed has to get there.
SETTLED, TIMES_USUAL, UNSETTLED_EPOCHS = 0.1, 3.0, 5


def _unrest(losses: tuple[float, ...]) -> tuple[float, float] | None:
    """(last change of the loss, bound to be settled), as shares; None where there is no change."""
    changes = [abs(b - a) / abs(a) for a, b in pairwise(losses[-22:]) if a]
    if not changes:
        return None
    usual = [c for c in changes[:-1] if math.isfinite(c)]
    return changes[-1], max(SETTLED, TIMES_USUAL * median(usual) if usual else 0.0)


@dataclass
class HeuristicPolicy:
    """When: every `every` epochs from `start` on, or after `patience` epochs in which the
    held-out loss fell by less than `min_delta` of itself. Load slows it: the interval is
    divided by the slow track's capacity factor.

    Where: the dormant site with the largest gradient signal. Which: the kernel whose
    blueprint has the best mean gain in field reports, untried ones taking an optimistic
    prior, faster ones preferred; within what is left of `max_parameters`, and only those that
    carry all of `tags` (see urabrask.tags: "high_speed", "low_memory", ...).

    A seed whose counterfactual gain is above `min_gain` (a share of the held-out loss) moves
    on; one that shows none within `training_epochs` is culled, and so is one that leaves the
    held-out loss restless for `UNSETTLED_EPOCHS` after `stabilization_epochs`.
    """

    trigger: str = "schedule"
    start: int = 2
    every: int = 3
    patience: int = 3
    min_delta: float = 0.01
    max_growths: int = 8
    max_active: int = 1
    max_parameters: int | None = None
    tags: tuple[str, ...] = ()
    training_epochs: int = 3
    stabilization_epochs: int = 1
    fine_tuning_epochs: int = 1
    min_gain: float = 0.0
    seed: int = 0
    _random: random.Random = field(init=False, repr=False)
    _last: int | None = field(init=False, repr=False, default=None)  # epoch of the last growth

    def __post_init__(self) -> None:
        if self.trigger not in ("schedule", "plateau"):
            raise ValueError(f"trigger is 'schedule' or 'plateau', not {self.trigger!r}")
        self._random = random.Random(self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.getstate(), "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random.setstate(state_dict["random"])
        self._last = state_dict["last"]

    # -- seeds on their way ---------------------------------------------------------------

    def _care_for(
        self, site: SiteStatus, threshold: float, unrest: tuple[float, float] | None
    ) -> Command | None:
        def command(action: Action, reason: str) -> Command:
            return Command(action=action, site=site.name, kernel_id=site.kernel_id,
                           trace_id=site.trace_id, reason=reason)

        gain, age = site.gain, site.epochs_in_state
        shown = "not measured" if gain is None else f"{gain:+.4g}"
        pays = gain is not None and math.isfinite(gain) and gain > threshold
        match site.state:
            case SeedState.TRAINING if age >= 1:
                if pays:
                    return command(Action.ADVANCE, f"isolated learning shows a gain of {shown}")
                if age >= self.training_epochs:
                    return command(Action.CULL, f"no signal in {age} epochs: gain {shown}")
            case SeedState.STABILIZATION if age >= self.stabilization_epochs:
                change, bound = unrest if unrest is not None else (math.nan, SETTLED)
                what = f"the held-out loss changed by {change:.1%}, settled is {bound:.1%}"
                if change <= bound:
                    return command(Action.ADVANCE, f"settled after {age} epochs: {what}")
                if age >= self.stabilization_epochs + UNSETTLED_EPOCHS:
                    return command(Action.CULL, f"unstable after {age} epochs: {what}")
            case SeedState.EVALUATING:
                if not pays:
                    return command(Action.CULL, f"counterfactual shows no gain: {shown}")
                if self.fine_tuning_epochs:
                    return command(Action.ADVANCE, f"counterfactual gain {shown}")
                return command(Action.FOSSILIZE, f"counterfactual gain {shown}, nothing to tune")
            case SeedState.FINE_TUNING if age >= self.fine_tuning_epochs:
                if pays:
                    return command(Action.FOSSILIZE, f"gain {shown} kept through fine-tuning")
                return command(Action.CULL, f"regressed in fine-tuning: gain {shown}")
        return None

    # -- new seeds ------------------------------------------------------------------------

    def _due(self, state: SystemState, capacity: float) -> tuple[str, str]:
        """The reason to germinate now and, where only load speaks against it, what it puts off;
        "" for what is not."""
        plain = self._reason(state, self.every, self.patience)
        if capacity >= 1 or not plain:
            return plain, ""
        every, patience = (math.ceil(n / capacity) for n in (self.every, self.patience))
        before, after = ((self.every, every) if self.trigger == "schedule"
                         else (self.patience, patience))
        slowed = f"capacity {capacity:g} makes {before} epochs {after}"
        reason = self._reason(state, every, patience)
        return (f"{reason}, slowed: {slowed}", "") if reason else ("", f"{plain}, but {slowed}")

    def _reason(self, state: SystemState, every: int, patience: int) -> str:
        last = self._last
        if self.trigger == "schedule":
            if state.epoch >= self.start and (last is None or state.epoch - last >= every):
                return f"schedule: every {self.every} epochs from {self.start}"
            return ""
        losses = state.holdout_losses
        if len(losses) <= patience or (last is not None and state.epoch - last < patience):
            return ""
        before, recent = min(losses[:-patience]), min(losses[-patience:])
        if recent > before * (1 - self.min_delta):
            return (f"plateau: best held-out loss {recent:.4g} after {before:.4g} "
                    f"{patience} epochs before")
        return ""

    def _choose(
        self, site: SiteStatus, state: SystemState, catalog: Catalog
    ) -> tuple[KernelRecord | None, list[Considered]]:
        gains: dict[str, list[float]] = defaultdict(list)
        for report in catalog.reports:
            if report.outcome in (SeedState.CULLED, SeedState.ROLLED_BACK):
                gains[report.blueprint_id].append(min(0.0, report.gain or 0.0))
            elif report.gain is not None:
                scale = abs(report.loss_before or 1.0) or 1.0
                gains[report.blueprint_id].append(report.gain / scale)
        means = {b: sum(g) / len(g) for b, g in gains.items()}
        prior = max([0.05, *means.values()])  # optimism: what is untried gets its chance
        left = None if self.max_parameters is None else self.max_parameters - state.grown_parameters
        ranked: list[tuple[float, float, KernelRecord, str]] = []
        looked: list[Considered] = []
        for kernel in catalog.kernels:
            if kernel.manifest.signature != site.signature:
                continue
            size = sum(math.prod(p.shape) for p in kernel.manifest.parameters)
            if kernel.blueprint_id in site.used_blueprints:
                looked.append(Considered(kernel.kernel_id, site.name, False, "tried here before"))
                continue
            if left is not None and size > left:
                looked.append(Considered(kernel.kernel_id, site.name, False,
                                         f"{size} parameters, {left} left in the budget"))
                continue
            carried = {t.name for t in kernel.report.tags} if kernel.report is not None else set()
            if lacking := [t for t in self.tags if t not in carried]:
                looked.append(Considered(kernel.kernel_id, site.name, False,
                                         f"not tagged {', '.join(lacking)}"))
                continue
            mean = means.get(kernel.blueprint_id)
            speed = kernel.report.speedup if kernel.report is not None else None
            value = (prior if mean is None else mean) + 0.01 * math.log(speed or 1.0)
            known = "untried" if mean is None else f"mean gain {mean:+.3g} of the loss in the field"
            fast = "unmeasured speed" if speed is None else f"{speed:.2f} times eager"
            ranked.append((value, self._random.random(), kernel, f"{known}, {fast}"))
        ranked.sort(key=lambda r: r[:2], reverse=True)
        looked += [Considered(k.kernel_id, site.name, i == 0, why)
                   for i, (_, _, k, why) in enumerate(ranked)]
        return (ranked[0][2] if ranked else None), looked

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        """Commands for this boundary; at most one germination."""
        threshold = self.min_gain * abs(state.holdout_losses[-1]) if state.holdout_losses else 0.0
        unrest = _unrest(state.holdout_losses)
        commands = [
            c for s in state.sites if (c := self._care_for(s, threshold, unrest)) is not None
        ]
        active = [s for s in state.sites if s.kernel_id is not None]
        dormant = [s for s in state.sites if s.state is SeedState.DORMANT]
        if len(active) >= self.max_active or state.growths >= self.max_growths or not dormant:
            return Decision(tuple(commands))
        reason, put_off = self._due(state, max(catalog.capacity, 0.1))
        if not reason:
            return Decision(tuple(commands), put_off=put_off)
        looked: list[Considered] = []
        for site in sorted(dormant, key=lambda s: s.score or 0.0, reverse=True):
            kernel, seen = self._choose(site, state, catalog)
            looked += seen
            if kernel is not None:
                signal = "" if site.score is None else f"; gradient signal {site.score:.3g}"
                why = next(c.reason for c in seen if c.chosen)
                commands.append(Command(
                    action=Action.GERMINATE, site=site.name, kernel_id=kernel.kernel_id,
                    blueprint_id=kernel.blueprint_id, reason=f"{reason}{signal}; {why}"))
                self._last = state.epoch
                break
        return Decision(tuple(commands), tuple(looked))
