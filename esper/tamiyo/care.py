"""What becomes of seeds on their way: who moves on, who leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

from esper.leyline.command import Action, Command
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import SiteStatus, SystemState

# STABILIZATION: the held-out loss counts as settled when it changed from one epoch to the next by
# no more than a tenth of itself, or than three times what this run's usually does; and how many
# more epochs a seed has to get there.
SETTLED, TIMES_USUAL, UNSETTLED_EPOCHS = 0.1, 3.0, 5


class Caretaker(Protocol):
    """Commands for the seeds that are on their way; see `Care`."""

    def looks_at(self, state: SystemState) -> frozenset[str]:
        """Names of the sites whose gain `commands` will look at. Others are not measured."""

    def commands(self, state: SystemState) -> list[Command]: ...


def _command(site: SiteStatus, action: Action, reason: str) -> Command:
    return Command(action=action, site=site.name, kernel_id=site.kernel_id,
                   trace_id=site.trace_id, reason=reason)


def _unrest(losses: tuple[float, ...]) -> tuple[float, float] | None:
    """(last change of the loss, bound to be settled), as shares; None where there is no change."""
    changes = [abs(b - a) / abs(a) for a, b in pairwise(losses[-22:]) if a]
    if not changes:
        return None
    usual = [c for c in changes[:-1] if math.isfinite(c)]
    return changes[-1], max(SETTLED, TIMES_USUAL * median(usual) if usual else 0.0)


@dataclass(frozen=True)
class Care:
    """A seed whose counterfactual gain is above `min_gain` (a share of the held-out loss) moves
    on; one that shows none within `training_epochs` is culled, and so is one that leaves the
    held-out loss restless for `UNSETTLED_EPOCHS` after `stabilization_epochs`.
    """

    training_epochs: int = 3
    stabilization_epochs: int = 1
    fine_tuning_epochs: int = 1
    min_gain: float = 0.0

    def looks_at(self, state: SystemState) -> frozenset[str]:
        least = {SeedState.TRAINING: 1, SeedState.EVALUATING: 0,
                 SeedState.FINE_TUNING: self.fine_tuning_epochs}
        return frozenset(s.name for s in state.sites
                         if s.state in least and s.epochs_in_state >= least[s.state])

    def commands(self, state: SystemState) -> list[Command]:
        losses = state.holdout_losses
        threshold = self.min_gain * abs(losses[-1]) if losses else 0.0
        unrest = _unrest(losses)
        found = (self._command(s, threshold, unrest) for s in state.sites)
        return [c for c in found if c is not None]

    def _command(
        self, site: SiteStatus, threshold: float, unrest: tuple[float, float] | None
    ) -> Command | None:
        gain, age = site.gain, site.epochs_in_state
        shown = "not measured" if gain is None else f"{gain:+.4g}"
        pays = gain is not None and math.isfinite(gain) and gain > threshold
        match site.state:
            case SeedState.TRAINING if age >= 1:
                if pays:
                    return _command(site, Action.ADVANCE,
                                    f"isolated learning shows a gain of {shown}")
                if age >= self.training_epochs:
                    return _command(site, Action.CULL, f"no signal in {age} epochs: gain {shown}")
            case SeedState.STABILIZATION if age >= self.stabilization_epochs:
                change, bound = unrest if unrest is not None else (math.nan, SETTLED)
                what = f"the held-out loss changed by {change:.1%}, settled is {bound:.1%}"
                if change <= bound:
                    return _command(site, Action.ADVANCE, f"settled after {age} epochs: {what}")
                if age >= self.stabilization_epochs + UNSETTLED_EPOCHS:
                    return _command(site, Action.CULL, f"unstable after {age} epochs: {what}")
            case SeedState.EVALUATING:
                if not pays:
                    return _command(site, Action.CULL, f"counterfactual shows no gain: {shown}")
                if self.fine_tuning_epochs:
                    return _command(site, Action.ADVANCE, f"counterfactual gain {shown}")
                return _command(site, Action.FOSSILIZE,
                                f"counterfactual gain {shown}, nothing to tune")
            case SeedState.FINE_TUNING if age >= self.fine_tuning_epochs:
                if pays:
                    return _command(site, Action.FOSSILIZE,
                                    f"gain {shown} kept through fine-tuning")
                return _command(site, Action.CULL, f"regressed in fine-tuning: gain {shown}")
        return None


@dataclass(frozen=True)
class Clockwork:
    """Every seed moves on when its time is over, whatever it does: nothing is measured for it, and
    nothing is culled but by the guards of `kasmina.guards`."""

    training_epochs: int = 1
    stabilization_epochs: int = 1
    fine_tuning_epochs: int = 0

    def looks_at(self, state: SystemState) -> frozenset[str]:
        return frozenset()

    def commands(self, state: SystemState) -> list[Command]:
        found = []
        for site in state.sites:
            age = site.epochs_in_state
            match site.state:
                case SeedState.TRAINING if age >= max(1, self.training_epochs):
                    action = Action.ADVANCE
                case SeedState.STABILIZATION if age >= self.stabilization_epochs:
                    action = Action.ADVANCE
                case SeedState.EVALUATING:
                    action = Action.ADVANCE if self.fine_tuning_epochs else Action.FOSSILIZE
                case SeedState.FINE_TUNING if age >= self.fine_tuning_epochs:
                    action = Action.FOSSILIZE
                case _:
                    continue
            found.append(_command(site, action, f"{age} epochs in {site.state} are over"))
        return found
