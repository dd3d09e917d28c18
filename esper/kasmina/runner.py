"""How one seed runs in its host's forward: one contract, in C++ and in Python.

`_C.RunningSeed` does a call in one crossing: mode, alpha, kernel, autograd. `PlainRunner` is the
same for kernels that are no native ones. One contract suite runs over both
(tests/kasmina/test_runner.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from esper.kasmina.native import extension
from esper.kasmina.plain_kernel import SECOND_DERIVATIVE, CallerError, SeedKernel
from esper.leyline.mode import FULL, TRAINING


class Runner(Protocol):
    """A kernel on its parameters, switched off until `set`.

    A call takes the site's output and returns it changed by the seed, or the very tensor it was
    given: where the seed is off, where alpha is 0, where nothing can learn, and in TRAINING beside
    a host that learns. There the parameters' gradients are added to their `.grad` by a hook on the
    tensor, so `torch.autograd.grad` does not see them. What that hook
    needs is kept beside the graph: activation checkpointing does not let go of it before the
    backward, and hooks on saved tensors do not see it.

    Parameters that require no gradient are left as they are.

    A kernel that raises, in its forward or its backward, is switched off for good, and `failure`
    says why; it is empty until then. The host goes on as it was: with its own output, and with the
    gradient of that. What the caller does wrong is raised and no failure: a second derivative
    (create_graph=True) and a parameter changed before the backward are RuntimeErrors of the
    backward (the latter is a failure where the seed's gradients do not pass through the graph).
    """

    def __call__(self, h: Tensor) -> Tensor:
        """Raises ValueError under a transform (torch.func, forward mode, a trace, fake tensors),
        which compiled code cannot follow, and for a tensor on another device than the kernel."""
    def set(self, alpha: float, mode: int) -> None:
        """Raises ValueError where alpha is not within 0 and 1."""
    def off(self) -> None: ...
    @property
    def failure(self) -> str: ...
    def ask_for_drift(self) -> None:
        """Measure |out - h| / |h| in every call until `take_drift`."""
    def take_drift(self) -> Tensor | None:
        """The largest drift of these calls, once; None where there was none."""


class PlainRunner:
    def __init__(
        self, kernel: Callable[[Tensor, list[Tensor], float, int], Tensor], params: list[Tensor]
    ) -> None:
        self.failure = ""
        if isinstance(kernel, SeedKernel):
            kernel = partial(kernel, failed=self._fail)
        self._kernel, self._params = kernel, params
        self._how: tuple[float, int] | None = None
        self._wants_drift = False
        self._drift: Tensor | None = None

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why or "unknown"

    def set(self, alpha: float, mode: int) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must be within 0 and 1")
        self._how = alpha, mode

    def off(self) -> None:
        self._how = None

    def ask_for_drift(self) -> None:
        self._wants_drift = True

    def take_drift(self) -> Tensor | None:
        drift, self._drift, self._wants_drift = self._drift, None, False
        return drift

    def __call__(self, h: Tensor) -> Tensor:
        if self._how is None or self.failure:
            return h
        try:
            return self._call(h, *self._how)
        except CallerError:
            raise
        except Exception as e:  # whatever a kernel does, the host's own output stands
            if type(e).__module__ == "torch.utils.checkpoint":
                raise  # how a recomputation is stopped that has all it needs
            self._fail(str(e) or type(e).__name__)
            return h

    def _call(self, h: Tensor, alpha: float, mode: int) -> Tensor:
        if mode == TRAINING and (h.requires_grad or not torch.is_grad_enabled()):
            if torch.is_grad_enabled():
                self._learn_aside(h)
            return h
        out = self._kernel(h, self._params, alpha, mode)
        if mode == TRAINING and out is not h:
            return out.clone()  # torch lets nobody work in place on a view that Python's node made
        if self._wants_drift:
            with torch.no_grad():
                drift = (out - h).norm() / h.norm()
                self._drift = drift if self._drift is None else self._drift.maximum(drift)
        return out

    def _learn_aside(self, h: Tensor) -> None:
        """Learn from the gradient that arrives at h, while h itself goes on as it is.

        The seed runs on a copy of h, as at alpha = 1; its own backward is started by a hook on
        h. So the very tensor of the host is what its next layer sees, in-place ones included,
        and whatever fails here stays here.
        """
        learning = [p for p in self._params if p.requires_grad]
        if not learning:
            return
        out = self._kernel(h.detach().clone(), self._params, 1.0, FULL)

        def deliver(gradient: Tensor) -> None:
            if torch.is_grad_enabled():
                raise RuntimeError(SECOND_DERIVATIVE)
            if not _accumulates_here():
                return
            try:
                # Retained, for the host's graph may be; it goes when the host's does.
                grads = torch.autograd.grad(
                    out, learning, gradient, retain_graph=True, allow_unused=True
                )
            except Exception as e:
                self._fail(f"backward: {e}")
                return
            for parameter, grad in zip(learning, grads, strict=True):
                if grad is not None:  # by its own node, which calls what waits for a gradient
                    accumulate: Any = get_gradient_edge(parameter).node
                    accumulate(grad)

        h.register_hook(deliver)


def _accumulates_here() -> bool:
    """Whether the backward that calls this hook leaves gradients in leaves.

    backward() does; torch.autograd.grad and backward(inputs=) ask for some tensors' gradients and
    must change nothing else. torch says only of a single node whether it will run, so this asks
    of one leaf below the hook's tensor: that of the last operand, which of a layer is its weight.
    """
    c: Any = torch._C
    node = c._current_autograd_node()
    while below := [n for n, _ in node.next_functions if n is not None]:
        node = below[-1]
    try:
        return bool(c._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad of this very leaf
        return False


def make_runner(kernel: Any, params: Sequence[nn.Parameter]) -> Runner:
    """The native one for a native kernel."""
    native = extension()
    if native is not None and isinstance(kernel, native.SeedKernel):
        runner: Runner = native.RunningSeed(kernel, list(params))
        return runner
    return PlainRunner(kernel, list(params))
