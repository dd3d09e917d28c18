"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.command import Command, FieldReport
from esper.leyline.library import KernelRecord, QueueDepths
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteSignature


@dataclass(frozen=True)
class SiteStatus:
    """One site at an epoch boundary.

    `gain` is loss without the seed minus loss with it on held-out batches, in full or, in
    TRAINING, at a small alpha; None where it was not measured. `score` says how much a seed could
    do here, comparable between the sites of a model (see tolaria.scores); None likewise.
    `epochs_in_state` counts whole epochs since the last transition. `positions` has, for each
    call in a forward pass, the positions of a sample; None where no example was given.
    """

    name: str
    signature: SiteSignature
    state: SeedState
    epochs_in_state: int = 0
    trace_id: str = ""
    kernel_id: str | None = None
    gain: float | None = None
    score: float | None = None
    fossils: int = 0
    used_blueprints: frozenset[str] = frozenset()
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SystemState:
    """The run at an epoch boundary; losses oldest first, in the units of the run's loss.

    `growths` counts the seeds there are, fossils and those on their way; `seeds` are their trace
    ids. `grown_parameters` and `grown_flops` (of one forward pass of one sample, None where it is
    not known) are what those among them take whose kernels are loaded. `planned_epochs` is None
    where nobody said how long the run is to be.
    """

    epoch: int
    train_losses: tuple[float, ...]
    holdout_losses: tuple[float, ...]
    sites: tuple[SiteStatus, ...]
    grown_parameters: int
    growths: int
    grown_flops: int | None = None
    seeds: frozenset[str] = frozenset()
    planned_epochs: int | None = None


@dataclass(frozen=True)
class Catalog:
    """What the library had when it was last looked at. `capacity` is 1.0 when unloaded;
    `depths` is None where it never answered. `blueprints` has the graphs of its kernels, by id."""

    kernels: tuple[KernelRecord, ...] = ()
    reports: tuple[FieldReport, ...] = ()
    capacity: float = 1.0
    depths: QueueDepths | None = None
    blueprints: Mapping[str, BlueprintIR] = field(default_factory=dict)


@dataclass(frozen=True)
class Considered:
    """One kernel that was looked at, and why it was or was not taken."""

    kernel_id: str
    site: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Spent:
    """What all seeds take of one budget, before this boundary's decision. `spent` is None where
    a seed's share was never measured."""

    name: str
    unit: str
    spent: float | None
    limit: float


@dataclass(frozen=True)
class Decision:
    """`put_off` says why a seed that was due was not germinated yet; "" where none was due."""

    commands: tuple[Command, ...] = ()
    considered: tuple[Considered, ...] = field(default=())
    put_off: str = ""
    budgets: tuple[Spent, ...] = ()


class Policy(Protocol):
    """Decides at epoch boundaries, from what it is given and nothing else. Must be quick.

    One that remembers something has `state_dict` and `load_state_dict`, in plain values, and is
    saved with the run. Measuring gains and scores costs passes over the held-out batches; a
    policy that does not need them at every boundary has `wants(state, catalog) -> frozenset[str]`:
    it is called right before `decide`, on a state without gains and scores, and names the sites
    whose gain or score `decide` will look at. For one that has no `wants`, all are measured.
    """

    def decide(self, state: SystemState, catalog: Catalog) -> Decision: ...
