"""The proof: a kernel means what its blueprint says, and behaves.

Conduct comes first, since a kernel that reuses or overwrites memory makes nonsense of every
comparison after it; then the identity at alpha 0; then outputs and all gradients against the
float64 reference (see `oracle`). The first failure ends the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.mode import FULL, GRAFTING, MODE_NAMES, TRAINING
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ProofCase
from esper.urabrask import conduct
from esper.urabrask.oracle import Oracle, Problem, reference_kernel
from esper.urabrask.problems import Case, draw, hostile, numeric_cases, typical

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Proof:
    """`reason` names the failed case, or is empty."""

    cases: tuple[ProofCase, ...]
    reason: str = ""

    @property
    def accepted(self) -> bool:
        return not self.reason


def prove(
    kernel: Kernel,
    ir: BlueprintIR,
    signature: SiteSignature,
    *,
    seeds: tuple[int, ...] = SEEDS,
    folder: Path | None = None,
) -> Proof:
    """Try to show that `kernel` is not `ir` at `signature`; what survives is accepted.

    `folder` is watched for files that the kernel leaves behind. Whatever the kernel raises is
    a failed case; what kills the process is the caller's to notice.
    """
    done: list[ProofCase] = []
    for name, case, check in _checks(kernel, ir, signature, seeds, folder):
        try:
            ratio, detail = check()
        except Exception as e:  # a kernel may raise anything
            ratio, detail = float("inf"), f"{type(e).__name__}: {str(e)[:500]}"
        done.append(
            ProofCase(
                name=name,
                batch=case.batch,
                space=case.space,
                worst_ratio=ratio,
                passed=not detail,
                detail=detail,
            )
        )
        if detail:
            return Proof(tuple(done), f"{name}: {detail}")
    return Proof(tuple(done))


_Check = Callable[[], tuple[float, str]]


def _checks(
    kernel: Kernel,
    ir: BlueprintIR,
    signature: SiteSignature,
    seeds: tuple[int, ...],
    folder: Path | None,
) -> Iterator[tuple[str, Case, _Check]]:
    case = typical(signature, 3, 5, 0.3)

    def problem(seed: int) -> Problem:
        return draw(ir, signature, case, seed)

    def conduct_check(name: str, check: Callable[[], str]) -> tuple[str, Case, _Check]:
        # A matter of yes or no has no ratio; 0 keeps it out of every maximum.
        return name, case, lambda: (0.0, check())

    eager = reference_kernel(ir, signature)
    yield conduct_check(
        "nothing left behind", lambda: conduct.residue(kernel, eager, problem(0), folder)
    )
    yield conduct_check("process untouched", lambda: conduct.meddling(kernel, problem(0)))
    yield conduct_check(
        "inputs untouched", lambda: conduct.run_watched(kernel, problem(0))[1]
    )
    yield conduct_check(
        "no output reused", lambda: conduct.reuse(kernel, problem(0), problem(1))
    )
    # Not among the cases where it cannot be tried.
    for much in (case, typical(signature, 64, 8, 0.3)) if conduct.CAN_POISON else ():
        name = f"memory written before it is read, batch {much.batch}"
        yield name, much, partial(_unwritten, kernel, ir, signature, much)
    yield conduct_check("no_grad", lambda: conduct.without_gradients(kernel, problem(0)))
    # Without a blend there is no identity to keep.
    poisons = () if signature.standalone else (
        float("nan"), float("inf"), torch.finfo(getattr(torch, signature.dtype)).max)
    for poison in poisons:
        for mode in (GRAFTING, FULL):
            hurt = hostile(ir, signature, mode, poison)
            yield conduct_check(
                f"identity at alpha 0, {MODE_NAMES[mode]}, parameters {poison:.3g}",
                partial(conduct.identity, kernel, hurt),
            )
        hurt = replace(hostile(ir, signature, TRAINING, poison), alpha=1.0)
        yield conduct_check(
            f"isolation in TRAINING, parameters {poison:.3g}",
            partial(conduct.isolation, kernel, hurt),
        )
    for numeric in numeric_cases(signature):
        yield numeric.name, numeric, partial(_numeric, kernel, ir, signature, numeric, seeds)


def _unwritten(
    kernel: Kernel, ir: BlueprintIR, signature: SiteSignature, case: Case
) -> tuple[float, str]:
    return 0.0, conduct.unwritten(kernel, draw(ir, signature, case, 0))


def _numeric(
    kernel: Kernel,
    ir: BlueprintIR,
    signature: SiteSignature,
    case: Case,
    seeds: tuple[int, ...],
) -> tuple[float, str]:
    oracle = Oracle(ir, signature)
    for seed in seeds:
        problem = draw(ir, signature, case, seed)
        with conduct.poisoned(0xFE):
            results, reason = conduct.run_watched(kernel, problem)
        if reason:
            return float("inf"), reason
        out = results[0]
        if out.shape != problem.h.shape or out.dtype != problem.h.dtype:
            return float("inf"), (
                f"the output is {tuple(out.shape)} {out.dtype}, h is "
                f"{tuple(problem.h.shape)} {problem.h.dtype}; they must be alike"
            )
        if case.mode == TRAINING and (reason := conduct.isolation(kernel, problem)):
            return float("inf"), reason
        oracle.add(results, problem)
    return oracle.worst.ratio, oracle.refusal
