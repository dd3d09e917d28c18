"""A growth as plain values, and back: how seeds get into a checkpoint and out of it.

Parameters are not in here: they are ordinary parameters of the model. A seed is described by its
kernel's id and papers, its blueprint, its state and its place in the schedule. When it comes back,
its kernel is taken from the library; one that is not there any more, is not to be trusted any more,
or does not run on this machine, is replaced by its blueprint in plain torch, with a warning.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future

import torch

from esper.errors import (
    ArtifactMismatch,
    BlueprintError,
    CheckpointError,
    EsperError,
    KernelFailure,
)
from esper.kasmina.artifact import OpenedKernel
from esper.kasmina.growth import Growth, Site
from esper.kasmina.loader import Loader, Ready
from esper.kasmina.plain_form import PlainForm
from esper.kasmina.schedule import SCHEDULES
from esper.kasmina.seed import Seed
from esper.leyline.artifact import Manifest, ParameterSpec
from esper.leyline.base import Contract
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.lifecycle import ACTIVE, SeedState
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature


class SeedRecord(Contract):
    """One seed. `manifest` and `ir` are None for one whose kernel had not been opened yet: the
    command that germinated it was in flight. `last_drift` is the last sample that was looked at,
    `drift` one that was not yet, `sampling` that one was asked for; `failure` what its kernel broke
    with."""

    number: int
    kernel_id: str
    blueprint_id: str
    trace_id: str
    state: SeedState
    alpha: float
    schedule: str
    graft_steps: int
    grafted: int
    epochs_in_state: int
    manifest: Manifest | None
    ir: BlueprintIR | None
    last_drift: float | None
    drift: float | None
    sampling: bool
    failure: str
    failure_told: bool


class SiteRecord(Contract):
    signature: SiteSignature
    fossils: tuple[SeedRecord, ...]
    seed: SeedRecord | None
    resting: SeedState
    last_trace: str
    embargo: int


class GrowthRecord(Contract):
    step: int
    epoch: int
    germinated: int
    sites: dict[str, SiteRecord]


def describe(growth: Growth) -> GrowthRecord:
    """The growth of a model at a step boundary.

    Raises:
        CheckpointError: a seed is blended in by a schedule that has no name.
    """
    return GrowthRecord(
        step=growth.step, epoch=growth.epoch, germinated=growth.germinated,
        sites={
            name: SiteRecord(
                signature=site.found.signature,
                fossils=tuple(_describe(f) for f in site.fossils),
                seed=_describe(site.seed) if site.seed is not None else None,
                resting=site.resting, last_trace=site.last_trace, embargo=site.embargo,
            )
            for name, site in growth.sites.items()
        },
    )


def _describe(seed: Seed) -> SeedRecord:
    schedule = next((name for name, known in SCHEDULES.items() if known is seed.schedule), None)
    if schedule is None:
        raise CheckpointError(f"the seed at {seed.site.name!r} has a schedule of its own making; "
                              f"a checkpoint knows {', '.join(SCHEDULES)}")
    drift, sampling = seed.pending_drift()
    return SeedRecord(
        number=seed.number, kernel_id=seed.kernel_id, blueprint_id=seed.blueprint_id,
        trace_id=seed.trace_id, state=seed.state, alpha=seed.alpha, schedule=schedule,
        graft_steps=seed.graft_steps, grafted=seed.grafted, epochs_in_state=seed.epochs_in_state,
        manifest=seed.kernel.manifest if seed.kernel is not None else None,
        ir=seed.kernel.ir if seed.kernel is not None else None, last_drift=seed.drift, drift=drift,
        sampling=sampling,
        failure=str(seed.failure or ""), failure_told=seed.failure_told,
    )


def revive(growth: Growth, record: GrowthRecord, loader: Loader | None) -> None:
    """Give a freshly wrapped model the seeds of `record`, their parameters zero until they are
    filled. `on_join` is told of none of them. Waits for their kernels.

    Raises:
        CheckpointError: the model is wrapped otherwise, has grown already, or `record` contradicts
            itself.
    """
    here = {name: site.found.signature for name, site in growth.sites.items()}
    there = {name: site.signature for name, site in record.sites.items()}
    if here != there:
        raise CheckpointError(
            f"the checkpoint was made at the sites {_shown(there)}; this model is wrapped at "
            f"{_shown(here)}; wrap the same model at the same sites"
        )
    if growth.fossils() or growth.active() or growth.step:
        raise CheckpointError("this model has been trained or grown already; resume with a fresh "
                              "one")
    growth.step, growth.epoch, growth.germinated = record.step, record.epoch, record.germinated
    for name, held in record.sites.items():
        site = growth.sites[name]
        site.resting, site.last_trace = held.resting, held.last_trace
        site.embargo = held.embargo
        site.fossils = [_revive(site, fossil, loader) for fossil in held.fossils]
        if held.seed is None:
            continue
        if held.seed.state not in ACTIVE:
            raise CheckpointError(f"the seed on its way at {name!r} is {held.seed.state}")
        site.seed = _revive(site, held.seed, loader)
        if held.seed.manifest is None:
            site.pending = _again(site, held.seed, growth.seed, loader)


def _shown(sites: dict[str, SiteSignature]) -> str:
    return ", ".join(f"{name} ({signature})" for name, signature in sites.items()) or "none"


def _again(site: Site, record: SeedRecord, seed: int, loader: Loader | None) -> Future[Ready]:
    """The command that was in flight, given once more."""
    if loader is not None:
        return loader.prefetch(record.kernel_id, site.found.signature, seed + record.number)
    nothing: Future[Ready] = Future()
    nothing.set_exception(EsperError("the run was resumed without a library"))
    return nothing


def _revive(site: Site, record: SeedRecord, loader: Loader | None) -> Seed:
    if record.schedule not in SCHEDULES:
        raise CheckpointError(f"the seed at {site.name!r} has the schedule {record.schedule!r}; "
                              f"there are {', '.join(SCHEDULES)}")
    seed = Seed(
        site.found, record.kernel_id, record.blueprint_id, record.trace_id, number=record.number,
        schedule=SCHEDULES[record.schedule], graft_steps=record.graft_steps, slot=site.slot,
    )
    seed.state, seed.alpha, seed.grafted = record.state, record.alpha, record.grafted
    seed.epochs_in_state, seed.failure_told = record.epochs_in_state, record.failure_told
    seed.drift = record.last_drift
    if record.manifest is None or record.ir is None:
        if record.state is not SeedState.GERMINATED:
            raise CheckpointError(f"the seed at {site.name!r} is {record.state} without a kernel")
        return seed
    kernel = _kernel(site, record, record.manifest, record.ir, loader)
    dtype = getattr(torch, site.found.signature.dtype)
    zeros = [torch.zeros(p.shape, dtype=dtype, device=site.found.signature.device)
             for p in kernel.manifest.parameters]
    try:
        seed.install(kernel, zeros)
    except KernelFailure as e:
        raise CheckpointError(f"the seed at {site.name!r} cannot go on here: {e}; resume with the "
                              "model as it was written, not compiled") from e
    seed.resume_health(record.drift, record.sampling, record.failure)
    return seed


def _kernel(
    site: Site, record: SeedRecord, manifest: Manifest, ir: BlueprintIR, loader: Loader | None
) -> OpenedKernel:
    signature = site.found.signature
    try:
        parameters = tuple(ParameterSpec(name=p.name, shape=p.shape)
                           for p in infer(ir, signature).parameters)
    except BlueprintError as e:
        raise CheckpointError(f"the blueprint of the seed at {site.name!r}: {e}") from e
    if manifest.parameters != parameters or manifest.blueprint_id != ir.id:
        raise CheckpointError(f"the seed at {site.name!r} has papers of another blueprint than it "
                              "carries; the checkpoint contradicts itself")
    try:
        if loader is None:
            raise EsperError("the run was resumed without a library")
        opened = loader.prefetch(record.kernel_id, signature, 0).result().kernel
        if opened.manifest.parameters != parameters or opened.ir.id != ir.id:
            raise ArtifactMismatch(f"the library's kernel {record.kernel_id} is made of another "
                                   "blueprint")
        return opened
    except Exception as e:  # whatever is wrong with the library, the run can go on
        warnings.warn(
            f"kernel {record.kernel_id} at {site.name!r} goes on as plain torch, slower, and equal "
            f"but for rounding: {e}", RuntimeWarning, stacklevel=2,
        )
        return OpenedKernel(manifest, ir, PlainForm(ir, signature))
