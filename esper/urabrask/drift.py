"""Precision drift: what rounding has done to the parameters after some steps of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import Drift
from esper.urabrask.oracle import Problem, reference_kernel, run
from esper.urabrask.problems import draw, typical

DTYPES = ("float32", "bfloat16")
STEPS = 20
_TRAVEL = 0.1  # of the parameters' own length, per tensor, over all steps


def drift(
    kernel: Kernel, ir: BlueprintIR, signature: SiteSignature, *, steps: int = STEPS
) -> tuple[Drift, ...]:
    """`Drift` of the kernel and of eager, in float32 and bfloat16 and the kernel's own dtype.

    All start at the same parameters and see the same inputs and gradients. The rate of
    learning is chosen per tensor so that float64 travels a tenth of its length; a blueprint
    without parameters has nothing that drifts, and a distance that is not finite is left out.
    """
    problems = [draw(ir, signature, typical(signature, 16, 8, 0.5), seed) for seed in range(4)]
    start = list(problems[0].params)
    if not start:
        return ()
    reference = reference_kernel(ir, signature)
    rates = _rates(reference, problems[0], steps)
    truth = _train(reference, problems, start, rates, torch.float64, torch.float64, steps)
    own: torch.dtype = getattr(torch, signature.dtype)
    found = []
    for name in dict.fromkeys((*DTYPES, str(signature.dtype))):
        dtype: torch.dtype = getattr(torch, name)
        by_kernel = _train(kernel, problems, start, rates, dtype, own, steps)
        by_eager = _train(reference, problems, start, rates, dtype, dtype, steps)
        distances = [_distance(x, truth, start) for x in (by_kernel, by_eager)]
        if all(math.isfinite(d) for d in distances):
            found.append(Drift(dtype=name, steps=steps, kernel=distances[0], eager=distances[1]))
    return tuple(found)


def _rates(reference: Kernel, problem: Problem, steps: int) -> list[float]:
    exact = problem.to(torch.float64)
    grads = run(reference, exact)[2:]
    return [
        _TRAVEL * max(float(p.norm()), 1e-3) / (steps * max(float(g.norm()), 1e-12))
        for p, g in zip(exact.params, grads, strict=True)
    ]


def _train(
    kernel: Kernel,
    problems: list[Problem],
    start: list[Tensor],
    rates: list[float],
    storage: torch.dtype,
    compute: torch.dtype,
    steps: int,
) -> list[Tensor]:
    """Plain SGD. Values are rounded to `storage` between steps and computed with in `compute`."""
    # Master weights in float64, as mixed precision keeps them: what drifts is the gradient.
    params = [p.double() for p in start]
    for i in range(steps):
        p = problems[i % len(problems)]
        given = Problem(p.h, tuple(params), p.grad_out, p.alpha, p.mode).to(storage).to(compute)
        grads = run(kernel, given)[2:]
        params = [
            q - rate * g.to(storage).double()
            for q, rate, g in zip(params, rates, grads, strict=True)
        ]
    return params


def _distance(found: list[Tensor], truth: list[Tensor], start: list[Tensor]) -> float:
    def length(a: list[Tensor], b: list[Tensor]) -> float:
        return float(torch.stack([(x - y.double()).norm() for x, y in zip(a, b, strict=True)])
                     .norm())

    travelled = length(truth, start)
    return length(found, truth) / travelled if travelled else math.inf
