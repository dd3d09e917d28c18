"""One seed: a kernel, its parameters and its place in the lifecycle.

The parameters are registered on the site's own module, as `esper<N>_<node>_<leaf>`. They
are therefore part of `model.parameters()`, `state_dict()` and `.to()`, and containers that
iterate over their children (`nn.Sequential`) see no new child.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper.errors import KernelFailure
from esper.kasmina.artifact import OpenedKernel
from esper.kasmina.guards import Health
from esper.kasmina.schedule import Schedule, linear
from esper.kasmina.sites import Found, first_tensor
from esper.leyline.lifecycle import SeedState, check

TRAINING, GRAFTING, FULL = 0, 1, 2  # modes of a kernel call

_MODE = {
    SeedState.TRAINING: TRAINING,
    SeedState.GRAFTING: GRAFTING,
    SeedState.STABILIZATION: FULL,
    SeedState.EVALUATING: FULL,
    SeedState.FINE_TUNING: FULL,
    SeedState.FOSSILIZED: FULL,
}


class Seed:
    """Lives at one site from GERMINATED to FOSSILIZED or out.

    `alpha` is what the blend uses. `forced` overrides it in evaluations: 0 shows the host
    without the seed, 1 the seed in full. Not thread-safe: the training thread owns it.
    """

    def __init__(
        self,
        site: Found,
        kernel_id: str,
        blueprint_id: str,
        trace_id: str,
        *,
        number: int = 0,
        schedule: Schedule = linear,
        graft_steps: int = 100,
    ) -> None:
        self.site = site
        self.kernel_id = kernel_id
        self.blueprint_id = blueprint_id
        self.trace_id = trace_id
        self.number = number
        self.state = SeedState.GERMINATED
        self.alpha = 0.0
        self.forced: float | None = None
        self.failure: KernelFailure | None = None
        self.failure_told = False
        self.kernel: OpenedKernel | None = None
        self.params: list[nn.Parameter] = []
        self.epochs_in_state = 0
        self._schedule = schedule
        self._graft_steps = graft_steps
        self._grafted = 0
        self._handle: Any = None
        self._sample = False
        self._drift: Tensor | None = None

    # -- installing -----------------------------------------------------------------------

    @property
    def parameter_names(self) -> list[str]:
        assert self.kernel is not None
        return [
            f"esper{self.number}_{p.name.replace('.', '_')}"
            for p in self.kernel.manifest.parameters
        ]

    def install(self, kernel: OpenedKernel, values: Sequence[Tensor]) -> None:
        """Register the parameters on the site and start taking part in its forward."""
        self.kernel = kernel
        self.params = [nn.Parameter(v) for v in values]
        self.attach()

    def attach(self) -> None:
        """Put parameters and hook on the site's module; later seeds run after earlier ones."""
        for name, parameter in zip(self.parameter_names, self.params, strict=True):
            self.site.module.register_parameter(name, parameter)
        self._handle = self.site.module.register_forward_hook(self._forward)

    def detach(self) -> None:
        """Take them off again; the module is as it was before, the seed keeps its parameters."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for name in self.parameter_names:
                delattr(self.site.module, name)

    def remove(self) -> None:
        """Leave for good."""
        self.detach()
        self.params = []
        self.kernel = None  # no longer pinned in the cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Seed:
        """A copied model (an average of weights, say) keeps its seeds; kernels are shared.

        The copy computes as the model did at that moment; no growth manages it.
        """
        other = copy.copy(self)
        memo[id(self)] = other
        other.params = copy.deepcopy(self.params, memo)
        other.site = replace(self.site, module=copy.deepcopy(self.site.module, memo))
        other._handle = None
        return other

    # -- the forward path -----------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = first_tensor(output)
        if h is None or self.failure is not None:
            return output
        try:
            out = self._call(h)
        except Exception as e:  # whatever a kernel does, the host's own output stands
            self.failure = KernelFailure(f"kernel {self.kernel_id} at {self.site.name!r}: {e}")
            return output
        return out if isinstance(output, Tensor) else (out, *output[1:])

    def _call(self, h: Tensor) -> Tensor:
        assert self.kernel is not None
        params = cast("list[Tensor]", self.params)
        if self.forced is not None:
            return h if self.forced == 0 else self.kernel.kernel(h, params, self.forced, FULL)
        mode = _MODE[self.state]
        if mode == TRAINING and (h.requires_grad or not torch.is_grad_enabled()):
            if torch.is_grad_enabled():
                self._learn_aside(h, params)
            return h
        out = self.kernel.kernel(h, params, self.alpha, mode)
        if self._sample:
            with torch.no_grad():
                self._drift = (out - h).norm() / h.norm()
            self._sample = False
        return out

    def _learn_aside(self, h: Tensor, params: list[Tensor]) -> None:
        """Learn from the gradient that arrives at h, while h itself goes on as it is.

        The seed runs on a copy of h, as at alpha = 1; its own backward is started by a hook on
        h. So the very tensor of the host is what its next layer sees, in-place ones included,
        and whatever fails here stays here.
        """
        assert self.kernel is not None
        out = self.kernel.kernel(h.detach().clone(), params, 1.0, FULL)

        def deliver(gradient: Tensor) -> None:
            try:
                grads = torch.autograd.grad(out, params, gradient)
            except Exception as e:
                self.failure = KernelFailure(
                    f"kernel {self.kernel_id} at {self.site.name!r}, backward: {e}")
                return
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

        h.register_hook(deliver)

    # -- lifecycle ------------------------------------------------------------------------

    def move(self, after: SeedState) -> SeedState:
        """Make one legal transition; returns the state before. An illegal one changes nothing.

        Raises:
            IllegalTransition: from the table in leyline.
        """
        check(self.state, after)
        before, self.state = self.state, after
        self.epochs_in_state = 0
        if after is SeedState.STABILIZATION:
            self.alpha = 1.0
        return before

    def tick(self) -> bool:
        """One step went by. Moves alpha while GRAFTING; True once it reached its target."""
        if self.state is not SeedState.GRAFTING:
            return False
        self._grafted = min(self._grafted + 1, self._graft_steps)
        self.alpha = self._schedule(self._grafted / self._graft_steps)
        return self._grafted == self._graft_steps

    def sample_health(self) -> None:
        """Ask for the drift of the next forward pass."""
        self._sample = True

    def health(self) -> Health:
        """What is known now. Synchronizes with the device; call it at boundaries only."""
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = None
        if grads:
            norm = float(torch.nn.utils.get_total_norm(grads))
        drift = None if self._drift is None else float(self._drift)
        self._drift = None
        return Health(drift=drift, grad_norm=norm)
