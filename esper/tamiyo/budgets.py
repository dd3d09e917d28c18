"""What all seeds of a run together may take, what they take, and what a kernel would add.

A cost that was never measured is not zero: what is not known to fit a budget does not fit it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import SeedState
from esper.leyline.shapes import flops_at, positions_at
from esper.leyline.verdict import Measurement
from esper.tamiyo.state import SiteStatus, Spent, SystemState


@dataclass(frozen=True)
class Costs:
    """Of one seed, or of several in sum; None where a part of it is not known. Fields as in
    `Budget`."""

    parameters: int | None = None
    flops: int | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None


@dataclass(frozen=True)
class Budget:
    """Limits for all seeds together; None is no limit.

    `flops` are those of one forward pass of one sample. `latency_ms` and `memory_mb` (10^6 bytes)
    are of one step, forward and backward, as Urabrask measured them: of the shapes in a kernel's
    report the one whose number of rows, batch times positions, is nearest to that of the site at
    `batch_size`; without a batch size, or positions, the largest. Peaks of memory are added up.
    """

    parameters: int | None = None
    flops: int | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None
    batch_size: int | None = None

    def limits(self) -> dict[str, float]:
        """By field, those that are set."""
        return {name: limit for name in _FORMS if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True)
class _Form:
    """How a cost is called and shown."""

    name: str
    unit: str
    figure: str

    def show(self, value: float) -> str:
        return format(value, self.figure) + (f" {self.unit}" if self.unit else "")


_FORMS: Mapping[str, _Form] = {
    "parameters": _Form("parameters", "parameters", ",d"),
    "flops": _Form("FLOPs", "FLOPs", ",d"),
    "latency_ms": _Form("latency", "ms", ".3g"),
    "memory_mb": _Form("memory", "MB", ".3g"),
}


def nearest(kernel: KernelRecord, positions: int | None, batch: int | None) -> Measurement | None:
    """The measurement in the report of `kernel` at the shape that is nearest to so many positions
    in a batch of so many samples; see `Budget`. None where nothing was measured."""
    if kernel.report is None or not kernel.report.measurements:
        return None
    signature = kernel.manifest.signature

    def rows(m: Measurement) -> int:
        return m.batch * positions_at(signature, m.space)

    if positions is None or batch is None:
        return max(kernel.report.measurements, key=rows)
    wanted = math.log(max(1, positions * batch))
    return min(kernel.report.measurements, key=lambda m: abs(math.log(rows(m)) - wanted))


class Books:
    """Keeps what the seeds of one run take of `budget`. Their latency and memory are remembered
    from when they were chosen, for a kernel may have left the catalog since."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self._limits = budget, budget.limits()
        self._booked: dict[str, Costs] = {}  # by trace id
        self._parameters: dict[str, int] = {}  # by kernel id
        self._flops: dict[tuple[Any, ...], int] = {}
        self._measured: dict[tuple[Any, ...], tuple[float | None, float | None]] = {}

    # -- what a kernel would add ----------------------------------------------------------

    def parameters(self, kernel: KernelRecord) -> int:
        found = self._parameters.get(kernel.kernel_id)
        if found is None:
            found = sum(math.prod(p.shape) for p in kernel.manifest.parameters)
            self._parameters[kernel.kernel_id] = found
        return found

    def flops(
        self, kernel: KernelRecord, site: SiteStatus, blueprints: Mapping[str, BlueprintIR]
    ) -> int | None:
        """Of one forward pass of one sample at `site`; None where its positions, or the kernel's
        graph, are not known."""
        ir = blueprints.get(kernel.blueprint_id)
        if ir is None or site.positions is None:
            return None
        key = (kernel.blueprint_id, site.signature, site.positions)
        if key not in self._flops:
            self._flops[key] = flops_at(ir, site.signature, site.positions)
        return self._flops[key]

    def measured(
        self, kernel: KernelRecord, site: SiteStatus
    ) -> tuple[float | None, float | None]:
        """(latency in ms, peak memory in MB) of the calls in one step; see `Budget`."""
        key = (kernel.kernel_id, site.positions)
        if key not in self._measured:
            calls = site.positions if site.positions is not None else (None,)
            found = [nearest(kernel, p, self.budget.batch_size) for p in calls]
            seconds = _sum([median(m.kernel_seconds) if m else None for m in found])
            peak = _sum([m.peak_bytes if m else None for m in found])
            self._measured[key] = (None if seconds is None else 1e3 * seconds,
                                   None if peak is None else peak / 1e6)
        return self._measured[key]

    def _cost(
        self, name: str, kernel: KernelRecord, site: SiteStatus,
        blueprints: Mapping[str, BlueprintIR],
    ) -> float | None:
        match name:
            case "parameters":
                return self.parameters(kernel)
            case "flops":
                return self.flops(kernel, site, blueprints)
            case "latency_ms":
                return self.measured(kernel, site)[0]
            case _:
                return self.measured(kernel, site)[1]

    def refusal(
        self, kernel: KernelRecord, site: SiteStatus, blueprints: Mapping[str, BlueprintIR],
        spent: Costs,
    ) -> str:
        """Why a seed of `kernel` at `site` does not fit, with figures; "" where it does."""
        for name, limit in self._limits.items():
            form, used = _FORMS[name], getattr(spent, name)
            cost = self._cost(name, kernel, site, blueprints)
            if cost is None:
                return f"{form.name} not known, and there is a budget of {form.show(limit)}"
            if used is None:
                return (f"{form.name} of the seeds there are is not known, and there is a budget "
                        f"of {form.show(limit)}")
            if cost > limit - used:
                left = format(max(limit - used, 0), form.figure)
                return f"{form.show(cost)}, {left} left in the budget"
        return ""

    # -- what there is --------------------------------------------------------------------

    def book(
        self, trace_id: str, kernel: KernelRecord, site: SiteStatus, state: SystemState,
        blueprints: Mapping[str, BlueprintIR],
    ) -> None:
        """A seed of `kernel` was chosen for `site`. Those that are no more are forgotten."""
        self._booked = {t: c for t, c in self._booked.items() if t in state.seeds}
        self._booked[trace_id] = Costs(
            self.parameters(kernel), self.flops(kernel, site, blueprints),
            *self.measured(kernel, site))

    def spent(self, state: SystemState) -> Costs:
        """By all seeds of `state`, those whose kernel is still being loaded included."""
        loading = [self._booked.get(s.trace_id, Costs()) for s in state.sites
                   if s.state is SeedState.GERMINATED]
        every = [self._booked.get(t, Costs()) for t in state.seeds]
        return Costs(
            _sum([state.grown_parameters, *(c.parameters for c in loading)]),
            _sum([state.grown_flops, *(c.flops for c in loading)]),
            _sum([c.latency_ms for c in every]), _sum([c.memory_mb for c in every]))

    def shown(self, spent: Costs) -> tuple[Spent, ...]:
        """What is spent of each budget that has a limit."""
        return tuple(
            Spent(_FORMS[n].name, "" if n in ("parameters", "flops") else _FORMS[n].unit,
                  getattr(spent, n), limit)
            for n, limit in self._limits.items())

    # -- a run that is saved --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {trace: asdict(costs) for trace, costs in self._booked.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._booked = {trace: Costs(**costs) for trace, costs in state_dict.items()}


def _sum(values: list[Any]) -> Any:
    return None if any(v is None for v in values) else sum(values)
