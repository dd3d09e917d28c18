"""What Tamiyo tells Kasmina to do, and what she reports afterwards."""

from __future__ import annotations

import time
from enum import StrEnum

from pydantic import Field

from esper.leyline.base import Contract
from esper.leyline.events import new_id
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteSignature


class Action(StrEnum):
    """The commands; each asks for one transition of the seed at `site`."""

    GERMINATE = "germinate"  # DORMANT -> GERMINATED, fetch and open the kernel
    ADVANCE = "advance"  # to the next state on the way to FOSSILIZED
    FOSSILIZE = "fossilize"  # EVALUATING or FINE_TUNING -> FOSSILIZED
    CULL = "cull"
    CANCEL = "cancel"


class Command(Contract):
    """`reason` is the trigger, in words with figures; it ends up in the audit trail."""

    command_id: str = Field(default_factory=lambda: new_id("cmd"))
    trace_id: str = Field(default_factory=lambda: new_id("tr"))
    action: Action
    site: str
    kernel_id: str | None = None
    blueprint_id: str | None = None
    reason: str


class Transition(Contract):
    """One line of the audit trail. `step` and `epoch` count completed ones."""

    trace_id: str
    site: str
    kernel_id: str | None
    before: SeedState
    after: SeedState
    trigger: str
    step: int
    epoch: int
    time: float = Field(default_factory=time.time)


class SeedHealth(Contract):
    """A seed on its way, as an epoch boundary saw it. None means not measured, never healthy.

    `drift` is |blended - h| / |h| over the batch that was sampled last in this state, `grad_norm`
    the 2-norm of the gradient of all its parameters, `gain` as in a FieldReport.
    """

    run_id: str
    trace_id: str
    site: str
    kernel_id: str
    state: SeedState
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    alpha: float
    drift: float | None = None
    grad_norm: float | None = None
    gain: float | None = None


class SeedContext(Contract):
    """What was known of a seed's site, kernel and moment when it was chosen. None is not known.

    The site: `depth` is its place among the run's sites, from 0, the first, to 1, the last;
    `relative_score` its score over the largest of the sites that were free; `fossils` how many
    seeds it keeps. The moment: whole epochs, seeds kept or on their way in the run, and
    `loss_share`, the held-out loss over the run's first. The kernel: `flops` and `speedup` as
    its manifest and verdict say; `layers` counts weights of two and more dimensions, `width` is
    the most channels that one of them gives, over the site's, `taps` the most positions that one
    of them sees. `tried` reports spoke of its blueprint, and `earned` was the worth
    to expect by them (`evidence.Earned.mean`). `policy` says who chose.
    """

    policy: str | None = None
    site: SiteSignature
    depth: float | None = None
    relative_score: float | None = None
    fossils: int = Field(ge=0)
    epoch: int = Field(ge=0)
    growths: int = Field(ge=0)
    loss_share: float | None = None
    parameters: int = Field(ge=0)
    flops: int = Field(ge=0)
    speedup: float | None = None
    layers: int = Field(ge=0)
    width: float | None = None
    taps: int | None = None
    tried: int = Field(ge=0)
    earned: float | None = None


class FieldReport(Contract):
    """How a kernel fared in a real run; Karn, Tezzeret, Urabrask and Simic learn from it.

    `gain` is loss(alpha = 0) - loss(alpha as reached) on held-out batches, in the units of
    the run's loss; None where the seed left before it was evaluated. Reports from before there
    were contexts have none.
    """

    report_id: str = Field(default_factory=lambda: new_id("fr"))
    run_id: str
    trace_id: str
    site: str
    kernel_id: str
    blueprint_id: str
    outcome: SeedState
    reason: str
    gain: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    epochs: int = Field(ge=0)
    time: float = Field(default_factory=time.time)
    context: SeedContext | None = None
