"""How interest follows evidence: the one rule by which a field report moves it.

A blueprint is submitted with its author's guess. A seed that fossilized with a gain takes half
of what is missing to 1; one that was culled loses a quarter of what is there. So interest
stays within [0, 1], one gain lifts a template from 0.6 to 0.8, above what Tezzeret compiles
AGGRESSIVE, two lift it to 0.9, which is strategic, and culls take it back. What was withdrawn
or rolled back, or was kept without a measured gain, says nothing about the blueprint.
"""

from __future__ import annotations

from esper.leyline.command import FieldReport
from esper.leyline.evidence import speaks
from esper.leyline.lifecycle import SeedState

GAINED = 0.5
CULLED = 0.25


def after(interest: float, report: FieldReport) -> float:
    """The interest in the blueprint of `report`, which had `interest` before."""
    if not speaks(report):
        return interest
    if report.outcome is SeedState.CULLED:
        return interest * (1 - CULLED)
    return interest + GAINED * (1 - interest) if (report.gain or 0.0) > 0 else interest
