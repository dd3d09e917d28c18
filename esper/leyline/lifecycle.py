"""The state machines: one enum and one transition table each.

The tables are data: tests are made from them, docs/lifecycle.md is printed from them by
`python -m esper.leyline.lifecycle`, and `check` is the only judge of whether a transition is
legal.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from esper.errors import IllegalTransition


class SeedState(StrEnum):
    """Life of one seed at one growth site."""

    DORMANT = "DORMANT"
    GERMINATED = "GERMINATED"
    TRAINING = "TRAINING"
    GRAFTING = "GRAFTING"
    STABILIZATION = "STABILIZATION"
    EVALUATING = "EVALUATING"
    FINE_TUNING = "FINE_TUNING"
    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"


class BlueprintStatus(StrEnum):
    """Life of one blueprint, for one site signature, in the library."""

    UNVALIDATED = "UNVALIDATED"
    COMPILING = "COMPILING"
    COMPILED = "COMPILED"
    INVALID = "INVALID"
    ARCHIVED = "ARCHIVED"


class KernelStatus(StrEnum):
    """Life of one compiled kernel in the library."""

    PENDING_BENCHMARKING = "PENDING_BENCHMARKING"
    BENCHMARKING = "BENCHMARKING"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    QUARANTINED = "QUARANTINED"
    RETIRED = "RETIRED"


# States of a seed on its way; in all but GERMINATED its kernel takes part in the host's steps.
ACTIVE: frozenset[SeedState] = frozenset(
    {
        SeedState.GERMINATED,
        SeedState.TRAINING,
        SeedState.GRAFTING,
        SeedState.STABILIZATION,
        SeedState.EVALUATING,
        SeedState.FINE_TUNING,
    }
)

_S, _B, _K = SeedState, BlueprintStatus, KernelStatus

SEED_TRANSITIONS: Mapping[SeedState, frozenset[SeedState]] = {
    _S.DORMANT: frozenset({_S.GERMINATED}),
    _S.GERMINATED: frozenset({_S.TRAINING, _S.CANCELLED, _S.CULLED, _S.ROLLED_BACK}),
    _S.TRAINING: frozenset({_S.GRAFTING, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK}),
    _S.GRAFTING: frozenset({_S.STABILIZATION, _S.CULLED, _S.ROLLED_BACK}),
    _S.STABILIZATION: frozenset({_S.EVALUATING, _S.CULLED, _S.ROLLED_BACK}),
    _S.EVALUATING: frozenset({_S.FINE_TUNING, _S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK}),
    _S.FINE_TUNING: frozenset({_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK}),
    _S.FOSSILIZED: frozenset(),
    _S.CULLED: frozenset({_S.DORMANT}),
    _S.CANCELLED: frozenset({_S.DORMANT}),
    _S.ROLLED_BACK: frozenset({_S.DORMANT}),
}

BLUEPRINT_TRANSITIONS: Mapping[BlueprintStatus, frozenset[BlueprintStatus]] = {
    _B.UNVALIDATED: frozenset({_B.COMPILING, _B.ARCHIVED}),
    # A lease that expires, or a recompilation that fails, returns the item to where it was.
    _B.COMPILING: frozenset({_B.COMPILED, _B.INVALID, _B.UNVALIDATED, _B.ARCHIVED}),
    _B.COMPILED: frozenset({_B.COMPILING, _B.ARCHIVED}),
    _B.INVALID: frozenset({_B.ARCHIVED}),
    # What was archived to shed load may be submitted again; Urza refuses it for the rest.
    _B.ARCHIVED: frozenset({_B.UNVALIDATED}),
}

KERNEL_TRANSITIONS: Mapping[KernelStatus, frozenset[KernelStatus]] = {
    # A full queue retires its last kernel for a more urgent one; Urza brings that kernel back
    # when there is room again, and no other retired one.
    _K.PENDING_BENCHMARKING: frozenset({_K.BENCHMARKING, _K.RETIRED}),
    _K.BENCHMARKING: frozenset({_K.VALIDATED, _K.REJECTED, _K.PENDING_BENCHMARKING}),
    _K.VALIDATED: frozenset({_K.QUARANTINED}),
    _K.REJECTED: frozenset(),
    _K.QUARANTINED: frozenset({_K.VALIDATED, _K.RETIRED}),
    _K.RETIRED: frozenset({_K.PENDING_BENCHMARKING}),
}

type_tables: Mapping[type[StrEnum], Mapping[StrEnum, frozenset[StrEnum]]] = {
    SeedState: SEED_TRANSITIONS,  # type: ignore[dict-item]
    BlueprintStatus: BLUEPRINT_TRANSITIONS,  # type: ignore[dict-item]
    KernelStatus: KERNEL_TRANSITIONS,  # type: ignore[dict-item]
}


def check(before: StrEnum, after: StrEnum) -> None:
    """Raise unless the table of their machine has `before` -> `after`.

    Raises:
        IllegalTransition: names both states and the states that were open.
    """
    legal = type_tables[type(before)][before]
    if after not in legal:
        open_to = ", ".join(sorted(legal)) or "none, it is final"
        raise IllegalTransition(
            f"{type(before).__name__} {before} -> {after} is not a transition; from {before} "
            f"the next states are: {open_to}"
        )


def as_markdown() -> str:
    """docs/lifecycle.md: one table per machine, states in the order of their enum."""
    parts = [
        "# Lifecycles",
        "",
        "Printed by `python -m esper.leyline.lifecycle` from the tables in",
        "`esper/leyline/lifecycle.py`; a test compares. What is not listed raises",
        "`IllegalTransition` and changes nothing.",
    ]
    for machine, table in type_tables.items():
        parts += ["", f"## {machine.__name__}", "", machine.__doc__ or "", "",
                  "| from | to |", "|---|---|"]
        for state in machine:
            after = [str(s) for s in machine if s in table[state]]
            parts.append(f"| {state} | {', '.join(after) or 'nothing: it is final'} |")
    return "\n".join([*parts, ""])


if __name__ == "__main__":
    print(as_markdown(), end="")
