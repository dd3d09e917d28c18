"""What is measured: the kernel, eager torch, and torch.compile, each as a training step.

A measured step is made hard to fake. Its inputs keep their addresses while their values
change between samples, so that a result remembered by address is a wrong one; and what it
gives at the end is judged by the oracle of the proof.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.mode import FULL
from esper.leyline.signature import SiteSignature
from esper.urabrask.oracle import Oracle, Problem, reference_kernel
from esper.urabrask.problems import draw, typical

ALPHA = 0.5  # between the ends, where nothing can be left out; 1 where there is no blend


class Side:
    """One implementation at one shape. Calling it does a forward and a backward."""

    def __init__(self, kernel: Kernel, problems: Sequence[Problem]) -> None:
        self._kernel, self._problems = kernel, problems
        first = problems[0]
        self._alpha = first.alpha
        self._h = first.h.detach().clone().requires_grad_(True)
        self._params = [p.detach().clone().requires_grad_(True) for p in first.params]
        self._grad_out = first.grad_out.clone()
        self._turn = 0
        self._last: tuple[Tensor, Sequence[Tensor]] | None = None

    def forward(self) -> Tensor:
        out = self._kernel(self._h, self._params, self._alpha, FULL)
        if out.is_cuda:  # else only the launch would be timed
            torch.cuda.synchronize()
        return out

    def backward(self, out: Tensor) -> None:
        grads = torch.autograd.grad(out, [self._h, *self._params], self._grad_out)
        if out.is_cuda:
            torch.cuda.synchronize()
        self._last = out, grads

    def __call__(self) -> None:
        self.backward(self.forward())

    def refresh(self) -> None:
        """Write the next problem's values where the last one's were."""
        self._turn = (self._turn + 1) % len(self._problems)
        with torch.no_grad():
            self._h.copy_(self._problems[self._turn].h)
            self._grad_out.copy_(self._problems[self._turn].grad_out)

    def objection(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        """What is wrong with the result of the last call, or of one with other values, or ""."""
        for _ in self._problems:
            if reason := self._judged(ir, signature):
                return reason
            self.refresh()
            self()
        return ""

    def _judged(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        if self._last is None:
            return "it was never called"
        out, grads = self._last
        oracle = Oracle(ir, signature)
        # Copies, for the oracle must not see values that change under it.
        problem = Problem(
            self._h.detach().clone(), self._problems[0].params, self._grad_out.clone(),
            self._alpha, FULL,
        )
        oracle.add([out.detach(), *grads], problem)
        return oracle.refusal


def problems(
    ir: BlueprintIR, signature: SiteSignature, batch: int, space: int
) -> tuple[Problem, ...]:
    """Two problems of one shape with the same parameters, to take turns."""
    case = typical(signature, batch, space, ALPHA)
    first = draw(ir, signature, case, 0)
    return first, draw(ir, signature, case, 1, first.params)


def compiled_kernel(ir: BlueprintIR, signature: SiteSignature) -> Kernel:
    """The eager side under torch.compile, one graph per shape, in this process.

    The first call at a shape compiles it, which takes seconds and a C++ compiler.
    """

    fast: Kernel = torch.compile(reference_kernel(ir, signature), dynamic=False, fullgraph=True)
    return fast
