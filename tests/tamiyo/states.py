"""Kernels, sites and runs for policies to decide on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from esper.leyline.artifact import Manifest
from esper.leyline.command import Action
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import Measurement, SpeedVerdict, Tag, ValidationReport
from esper.tamiyo.state import Catalog, Decision, Policy, SiteStatus, SystemState
from tests.support import bottleneck, opened

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=12)
PARAMETERS, FLOPS = 162, 348  # of the bottleneck that `kernel` is


def measurement(batch: int, space: int, ms: float, peak_bytes: int | None) -> Measurement:
    return Measurement(batch=batch, space=space, speedup=1.0, low=1.0, high=1.0,
                       verdict=SpeedVerdict.SAME, kernel_seconds=(ms / 1e3,) * 3,
                       eager_seconds=(ms / 1e3,) * 3, peak_bytes=peak_bytes)


def kernel(name: str, signature: SiteSignature = SIG, *tags: str, created: float = 0,
           measured: tuple[Measurement, ...] = ()) -> KernelRecord:
    report = ValidationReport(
        kernel_id=name, accepted=True, seconds=0, measurements=measured,
        tags=tuple(Tag(name=tag, evidence="test", value=1) for tag in tags))
    ir = bottleneck(signature.kind)
    manifest: Manifest = opened(ir, signature).manifest.model_copy(update={"kernel_id": name})
    return KernelRecord(kernel_id=name, blueprint_id=f"bp-{name}", manifest=manifest,
                        digest="0" * 64, size=1, status=KernelStatus.VALIDATED, created=created,
                        updated=0, report=report)


def catalog(*kernels: KernelRecord, **more: Any) -> Catalog:
    """With the graphs of the kernels."""
    return Catalog(kernels, blueprints={
        k.blueprint_id: bottleneck(k.manifest.signature.kind) for k in kernels}, **more)


def state(epoch: int, *sites: SiteStatus, losses: tuple[float, ...] = (1.0,),
          train: tuple[float, ...] | None = None, grown: int = 0, **more: Any) -> SystemState:
    return SystemState(epoch, losses if train is None else train, losses, sites, grown, 0, **more)


def site(name: str = "a", at: SeedState = SeedState.DORMANT, **more: object) -> SiteStatus:
    status = SiteStatus(name, SIG, at, positions=(1,))
    if at is not SeedState.DORMANT:
        status = replace(status, kernel_id="k", trace_id="t")
    return replace(status, **more)  # type: ignore[arg-type]


class World:
    """A run in which every epoch boundary does what the policy commands, and seeds gain what
    `gain` says. `grown` are (epoch, site, kernel id) of its germinations."""

    def __init__(self, sites: tuple[SiteStatus, ...], catalog: Catalog, gain: float = 0.1) -> None:
        self.sites, self.catalog, self.gain = {s.name: s for s in sites}, catalog, gain
        self.kernels = {k.kernel_id: k for k in catalog.kernels}
        self.living: dict[str, KernelRecord] = {}
        self.grown: list[tuple[int, str, str]] = []
        self.decisions: list[Decision] = []
        self.wanted: list[frozenset[str]] = []

    def state(self, epoch: int, planned: int | None) -> SystemState:
        loading = {s.trace_id for s in self.sites.values() if s.state is SeedState.GERMINATED}
        loaded = len(self.living.keys() - loading)
        return SystemState(
            epoch, (1.0,) * epoch, (1.0,) * epoch, tuple(self.sites.values()),
            grown_parameters=PARAMETERS * loaded, growths=len(self.living),
            grown_flops=FLOPS * loaded, seeds=frozenset(self.living), planned_epochs=planned)

    def run(self, policy: Policy, epochs: int, planned: int | None = None, first: int = 1) -> World:
        for epoch in range(first, epochs + 1):
            self.sites = {n: replace(s, epochs_in_state=s.epochs_in_state + 1)
                          for n, s in self.sites.items()}
            self._pass_on()
            state = self.state(epoch, planned)
            wanted = policy.wants(state, self.catalog)  # type: ignore[attr-defined]
            self.wanted.append(wanted)
            seen = replace(state, sites=tuple(
                replace(s, gain=self.gain if s.name in wanted and s.kernel_id else None,
                        score=1.0 if s.name in wanted and not s.kernel_id else None)
                for s in state.sites))
            decision = policy.decide(seen, self.catalog)
            self.decisions.append(decision)
            for c in decision.commands:
                self._obey(epoch, c)
        return self

    def _move(self, name: str, to: SeedState, **more: Any) -> None:
        self.sites[name] = replace(self.sites[name], state=to, epochs_in_state=0, **more)

    def _pass_on(self) -> None:
        """What goes on by itself, early in an epoch: loading, and blending in."""
        after = {SeedState.GERMINATED: SeedState.TRAINING,
                 SeedState.GRAFTING: SeedState.STABILIZATION}
        for name, s in list(self.sites.items()):
            if s.state in after:
                self.sites[name] = replace(s, state=after[s.state], epochs_in_state=1)

    def _obey(self, epoch: int, c: Any) -> None:
        s = self.sites[c.site]
        if c.action is Action.GERMINATE:
            assert s.state is SeedState.DORMANT
            self.grown.append((epoch, c.site, c.kernel_id))
            self.living[c.trace_id] = self.kernels[c.kernel_id]
            self._move(c.site, SeedState.GERMINATED, trace_id=c.trace_id, kernel_id=c.kernel_id,
                       used_blueprints=s.used_blueprints | {c.blueprint_id})
        elif c.action is Action.CULL:
            del self.living[s.trace_id]
            self._move(c.site, SeedState.DORMANT, trace_id="", kernel_id=None)
        elif c.action is Action.FOSSILIZE:
            self._move(c.site, SeedState.DORMANT, trace_id="", kernel_id=None,
                       fossils=s.fossils + 1)
        else:
            assert c.action is Action.ADVANCE
            self._move(c.site, {SeedState.TRAINING: SeedState.GRAFTING,
                                SeedState.STABILIZATION: SeedState.EVALUATING,
                                SeedState.EVALUATING: SeedState.FINE_TUNING}[s.state])

    def cost(self, of: str) -> float:
        """Of everything that lives, worked out here."""
        ks = self.living.values()
        if of == "parameters":
            return sum(math.prod(p.shape) for k in ks for p in k.manifest.parameters)
        assert all(k.report is not None for k in ks)
        return sum(1e3 * k.report.measurements[0].kernel_seconds[0]  # type: ignore[union-attr]
                   for k in ks)
