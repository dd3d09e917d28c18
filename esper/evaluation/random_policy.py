"""The random twin: place, time and kernel by lot, and every seed is kept."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from esper.leyline.command import Action, Command
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import Catalog, Decision, SiteStatus, SystemState


@dataclass
class RandomPolicy:
    """Germinates with probability `chance` at each boundary, with a kernel of the same catalog and
    within the same limits as the policy it is the twin of. A seed moves on at a fixed age and is
    kept in the end: nothing that is measured is looked at.

    Args:
        training_epochs, stabilization_epochs, fine_tuning_epochs: how long a seed stays there.
    """

    chance: float
    max_growths: int
    max_active: int = 1
    max_parameters: int | None = None
    training_epochs: int = 1
    stabilization_epochs: int = 1
    fine_tuning_epochs: int = 1
    seed: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        commands = [c for s in state.sites if (c := self._move_on(s)) is not None]
        if self._random.random() < self.chance and (born := self._germinate(state, catalog)):
            commands.append(born)
        return Decision(tuple(commands))

    def _move_on(self, site: SiteStatus) -> Command | None:
        due = {
            SeedState.TRAINING: self.training_epochs,
            SeedState.STABILIZATION: self.stabilization_epochs,
            SeedState.EVALUATING: 0, SeedState.FINE_TUNING: self.fine_tuning_epochs,
        }.get(site.state)
        if due is None or site.epochs_in_state < due:
            return None
        action = Action.FOSSILIZE if site.state is SeedState.FINE_TUNING else Action.ADVANCE
        return Command(action=action, site=site.name, kernel_id=site.kernel_id,
                       trace_id=site.trace_id, reason=f"{due} epochs in this state")

    def _germinate(self, state: SystemState, catalog: Catalog) -> Command | None:
        active = sum(s.kernel_id is not None for s in state.sites)
        dormant = [s for s in state.sites if s.state is SeedState.DORMANT]
        if active >= self.max_active or state.growths >= self.max_growths or not dormant:
            return None
        site = self._random.choice(dormant)
        left = (math.inf if self.max_parameters is None
                else self.max_parameters - state.grown_parameters)
        fitting = [k for k in catalog.kernels
                   if k.manifest.signature == site.signature and _size(k) <= left]
        if not fitting:
            return None
        kernel = self._random.choice(sorted(fitting, key=lambda k: k.kernel_id))
        return Command(action=Action.GERMINATE, site=site.name, kernel_id=kernel.kernel_id,
                       blueprint_id=kernel.blueprint_id, reason="by lot")


def _size(kernel: KernelRecord) -> int:
    return sum(math.prod(p.shape) for p in kernel.manifest.parameters)
