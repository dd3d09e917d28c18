"""What a policy sees and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from esper.leyline.command import Command, FieldReport
from esper.leyline.library import KernelRecord, QueueDepths
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteSignature


@dataclass(frozen=True)
class SiteStatus:
    """One site at an epoch boundary.

    `gain` is loss without the seed minus loss with it on held-out batches, in full or, in
    TRAINING, at a small alpha; None where it was not measured. `score` is the site's gradient
    signal (see tolaria.measure). `epochs_in_state` counts whole epochs since the last
    transition.
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


@dataclass(frozen=True)
class SystemState:
    """The run at an epoch boundary; losses oldest first, in the units of the run's loss."""

    epoch: int
    train_losses: tuple[float, ...]
    holdout_losses: tuple[float, ...]
    sites: tuple[SiteStatus, ...]
    grown_parameters: int
    growths: int


@dataclass(frozen=True)
class Catalog:
    """What the library had when it was last looked at. `capacity` is 1.0 when unloaded;
    `depths` is None where it never answered."""

    kernels: tuple[KernelRecord, ...] = ()
    reports: tuple[FieldReport, ...] = ()
    capacity: float = 1.0
    depths: QueueDepths | None = None


@dataclass(frozen=True)
class Considered:
    """One kernel that was looked at, and why it was or was not taken."""

    kernel_id: str
    site: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """`put_off` says why a seed that was due was not germinated yet; "" where none was due."""

    commands: tuple[Command, ...] = ()
    considered: tuple[Considered, ...] = field(default=())
    put_off: str = ""


class Policy(Protocol):
    """Decides at epoch boundaries, from what it is given and nothing else. Must be quick.

    One that remembers something has `state_dict` and `load_state_dict`, in plain values, and is
    saved with the run.
    """

    def decide(self, state: SystemState, catalog: Catalog) -> Decision: ...
