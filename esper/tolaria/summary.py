"""What a session says of an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from esper.tamiyo.state import Decision, SiteStatus


@dataclass(frozen=True)
class Passes:
    """How often a held-out batch went through the model at a boundary, for whoever counts FLOPs.

    A `backward` of a site score computes gradients of activations alone, and those only down to
    the first site that is scored: at most as many FLOPs as a forward pass, where one of a training
    step has twice as many.
    """

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class EpochSummary:
    """What one epoch boundary saw and decided; losses in the units of the run's loss.

    `sites` is what the policy was shown, before its commands were carried out.
    """

    epoch: int
    step: int
    train_loss: float | None
    holdout_loss: float
    decision: Decision
    sites: tuple[SiteStatus, ...]
    decision_seconds: float
    rolled_back: bool
    passes: Passes
