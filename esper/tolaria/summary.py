"""What a session says of an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from esper.tamiyo.state import Decision, SiteStatus


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
