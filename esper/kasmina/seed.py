"""One seed: a kernel, its parameters and its place in the lifecycle.

The parameters are registered on the site's own module, as `esper<N>_<node>_<leaf>`. They
are therefore part of `model.parameters()`, `state_dict()` and `.to()`, and containers that
iterate over their children (`nn.Sequential`) see no new child.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.errors import KernelFailure
from esper.kasmina.artifact import OpenedKernel
from esper.kasmina.guards import Health
from esper.kasmina.output import first_tensor, with_tensor
from esper.kasmina.runner import PlainRunner, Runner, make_runner
from esper.kasmina.schedule import Schedule, linear
from esper.kasmina.sites import Found
from esper.leyline.lifecycle import SeedState, check
from esper.leyline.mode import FULL, GRAFTING, TRAINING

if TYPE_CHECKING:
    from esper.kasmina.slot import Slot

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
    without the seed, 1 the seed in full. In a compiled host the seed is run by its site's
    `slot`, elsewhere by a forward hook. Not thread-safe: the training thread owns it.
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
        slot: Slot | None = None,
    ) -> None:
        self.site = site
        self.kernel_id = kernel_id
        self.blueprint_id = blueprint_id
        self.trace_id = trace_id
        self.number = number
        self.state = SeedState.GERMINATED
        self.alpha = 0.0
        self.failure_told = False
        self.drift: float | None = None  # the last one measured in this state
        self.kernel: OpenedKernel | None = None
        self.runner: Runner | None = None
        self.params: list[nn.Parameter] = []
        self.epochs_in_state = 0
        self.schedule, self.graft_steps = schedule, graft_steps
        self.grafted = 0  # steps of it done
        self._sampling = False  # a drift was asked for
        self._drift: float | None = None
        self._failed = ""  # before the run was resumed
        self._forced: float | None = None
        self._slot = slot
        self._handle: Any = None

    # -- installing -----------------------------------------------------------------------

    @property
    def parameter_names(self) -> list[str]:
        assert self.kernel is not None
        return [
            f"esper{self.number}_{p.name.replace('.', '_')}"
            for p in self.kernel.manifest.parameters
        ]

    def install(self, kernel: OpenedKernel, values: Sequence[Tensor]) -> None:
        """Register the parameters on the site and start taking part in its forward.

        Raises:
            KernelFailure: a compiled host can run only what the extension opened.
        """
        params = [nn.Parameter(v) for v in values]
        runner = make_runner(kernel.kernel, params)
        if self._slot is not None and isinstance(runner, PlainRunner):
            raise KernelFailure(
                f"kernel {self.kernel_id} runs through Python, and the slots of a compiled host "
                f"run native kernels only; install esper where its extension builds for "
                f"{self.site.signature.device}"
            )
        self.kernel, self.params, self.runner = kernel, params, runner
        self.attach()

    def attach(self) -> None:
        """Take a place at the site's module; later seeds run after earlier ones."""
        for name, parameter in zip(self.parameter_names, self.params, strict=True):
            self.site.module.register_parameter(name, parameter)
        if self._slot is not None:
            self._slot.add(self)
        else:
            self._handle = self.site.module.register_forward_hook(self._forward)
        self._drive()

    def detach(self) -> None:
        """Leave it again; the module is as it was before, the seed keeps its parameters."""
        if self.runner is None:
            return
        if self._slot is not None:
            self._slot.remove(self)
        elif self._handle is not None:
            self._handle.remove()
            self._handle = None
        for name in self.parameter_names:
            delattr(self.site.module, name)

    @property
    def hook_id(self) -> int | None:
        """Where among the module's forward hooks it runs; None while it is off."""
        handle = self._handle if self._slot is None else self._slot.handle
        return None if handle is None else handle.id

    def remove(self) -> None:
        """Leave for good."""
        self.detach()
        self.params, self.runner = [], None
        self.kernel = None  # no longer pinned in the cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Seed:
        """A copied model (an average of weights, say) keeps its seeds; kernels are shared.

        The copy computes as the model did at that moment; no growth manages it.
        """
        other = copy.copy(self)
        memo[id(self)] = other
        other.params = copy.deepcopy(self.params, memo)
        other.site = replace(self.site, module=copy.deepcopy(self.site.module, memo))
        other._handle, other._slot = None, None
        if self.kernel is not None and self.runner is not None:
            other.runner = make_runner(self.kernel.kernel, other.params)
            other._drive()
        return other

    def copied_to(self, module: nn.Module) -> Seed:
        """A copy at the same place of a copied model, `module`, that takes part there."""
        other = copy.deepcopy(self, {id(self.site.module): module})
        hooks = module._forward_hooks.values()
        other._slot = next((h for h in hooks if type(h) is type(self._slot)), None) \
            if self._slot is not None else None
        other.attach()
        return other

    def imitate(self, other: Seed) -> None:
        """Be blended in as `other` is."""
        if (self.state, self.alpha, self.forced) != (other.state, other.alpha, None):
            self.state, self.alpha, self._forced = other.state, other.alpha, None
            self._drive()

    # -- the forward path -----------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = first_tensor(output)
        if h is None or self.runner is None:
            return output
        out = self.runner(h)
        return output if out is h else with_tensor(output, out)

    def _drive(self) -> None:
        """Tell the runner how to run from now on."""
        if self.runner is None:
            return
        if self._failed:
            self.runner.off()
        elif self.forced is not None:
            self.runner.set(self.forced, FULL)
        elif self.state in _MODE:
            self.runner.set(self.alpha, _MODE[self.state])
        else:
            self.runner.off()

    @property
    def forced(self) -> float | None:
        return self._forced

    @forced.setter
    def forced(self, alpha: float | None) -> None:
        self._forced = alpha
        self._drive()

    @property
    def failure(self) -> KernelFailure | None:
        """What the kernel broke with, if it did; it has not been run since."""
        if self._failed:
            return KernelFailure(self._failed)
        why = self.runner.failure if self.runner is not None else ""
        if not why:
            return None
        return KernelFailure(f"kernel {self.kernel_id} at {self.site.name!r}: {why}")

    # -- lifecycle ------------------------------------------------------------------------

    def move(self, after: SeedState) -> SeedState:
        """Make one legal transition; returns the state before. An illegal one changes nothing.

        Raises:
            IllegalTransition: from the table in leyline.
        """
        check(self.state, after)
        before, self.state = self.state, after
        self.epochs_in_state = 0
        self.drift = None
        if after is SeedState.STABILIZATION:
            self.alpha = 1.0
        self._drive()
        return before

    def tick(self) -> bool:
        """One step went by. Moves alpha while GRAFTING; True once it reached its target."""
        if self.state is not SeedState.GRAFTING:
            return False
        self.grafted = min(self.grafted + 1, self.graft_steps)
        self.alpha = self.schedule(self.grafted / self.graft_steps)
        self._drive()
        return self.grafted == self.graft_steps

    def sample_health(self) -> None:
        """Ask for the drift of the next forward pass."""
        if self.runner is not None:
            self._sampling = True
            self.runner.ask_for_drift()

    def health(self) -> Health:
        """What is known now. Synchronizes with the device; call it at boundaries only."""
        drift, _ = self.pending_drift()
        self._drift, self._sampling = None, False
        if drift is not None:
            self.drift = drift
        return Health(drift=drift, grad_norm=self.grad_norm())

    def grad_norm(self) -> float | None:
        """The 2-norm of the gradient of all parameters; None where there is none."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else None

    def pending_drift(self) -> tuple[float | None, bool]:
        """(drift that was measured and not looked at yet, whether one is still to be measured)."""
        if self.runner is not None and (drift := self.runner.take_drift()) is not None:
            self._drift, self._sampling = float(drift), False
        return self._drift, self._sampling

    def resume_health(self, drift: float | None, sampling: bool, failure: str) -> None:
        """Go on from what `pending_drift` and `failure` were when the run was interrupted."""
        self._drift, self._failed = drift, failure
        if sampling:
            self.sample_health()
        self._drive()

    def fail(self, reason: str) -> None:
        """Switch it off for good, as its kernel's failure would."""
        self._failed = reason
        self._drive()


class Vitals:
    """How a growth learns how a seed is. Where several processes train one model, what answers
    alike on all of them takes its place."""

    def failure(self, seed: Seed) -> KernelFailure | None:
        return seed.failure

    def health(self, seed: Seed) -> Health:
        return seed.health()
