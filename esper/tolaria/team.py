"""What the ranks of a data-parallel run agree on, so that all do the same at the same step.

Rank 0 decides: it alone looks at the library and asks the policy. Everything that a decision, a
guard or a rollback rests on is put together from all ranks first.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.errors import ContractError, KernelFailure, RankError
from esper.kasmina.growth import Growth
from esper.kasmina.guards import Health
from esper.kasmina.loader import Loader
from esper.kasmina.parallel import sharded_modules
from esper.kasmina.seed import Seed, Vitals
from esper.leyline.command import Command
from esper.tamiyo.state import (
    Catalog,
    Considered,
    Decision,
    Policy,
    SiteStatus,
    Spent,
    SystemState,
)
from esper.tolaria.arrivals import SharedLoader
from esper.tolaria.gradients import SeedGradients
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.losses import look_every
from esper.tolaria.measure import LossFn, mean_loss
from esper.tolaria.ranks import Ranks
from esper.tolaria.sharded import is_sharded
from esper.tolaria.snapshot import Parts

LOOK_EVERY = 20  # steps between two looks at the losses of all ranks
# What was measured of a site; a field that a policy adds is averaged too.
_MEASURED = [f.name for f in fields(SiteStatus) if f.type in ("float", "float | None")]


class Team(Vitals):
    """The ranks, as a session sees them; in a single process nothing is exchanged.

    `model` is what measurements call: DistributedDataParallel's inner module, for nothing is to be
    reduced then. What collectives a run has is in docs/data_parallel.md.

    Raises:
        ContractError: several processes, and a model that is not parallel, or parallel in a way
            that seeds cannot join.
    """

    def __init__(self, model: nn.Module, parts: Parts, growth: Growth) -> None:
        self.ranks = Ranks()
        self.model = model
        self.loader: SharedLoader | None = None
        self.look_every = look_every(model)
        self._parts, self._growth = parts, growth
        self._told: set[Seed] = set()  # whose failure all ranks know
        self._gradients: SeedGradients | None = None
        if self.ranks.size > 1:
            self.model = _measured(model, parts, growth, self.ranks)
            self.look_every = LOOK_EVERY
            growth.vitals = self
            self._gradients = SeedGradients(model, self._params, self.ranks)

    @property
    def first(self) -> bool:
        return self.ranks.first

    def _seeds(self) -> list[Seed]:
        return sorted(self._growth.fossils() + self._growth.active(), key=lambda s: s.number)

    def _params(self) -> list[nn.Parameter]:
        return [p for seed in self._seeds() for p in seed.params]

    def shared(self, loader: Loader | None) -> Loader | None:
        if loader is None or self.ranks.size == 1:
            return loader
        self.loader = SharedLoader(loader, self.ranks)
        return self.loader

    def share_pending(self) -> None:
        """Wait together for what a resumed run was loading."""
        for site in self._growth.sites.values():
            if self.loader is not None and site.pending is not None:
                site.pending = self.loader.share(site.pending)

    def compare(self, held_out: int, library: bool, keeper: Checkpoints | None) -> None:
        """
        Raises:
            ContractError: a rank was given something else than rank 0.
        """
        terms: dict[str, Any] = {
            "sites": {n: str(s.found.signature) for n, s in self._growth.sites.items()},
            "number of held-out batches": held_out, "a library": library,
            "reproducible": self._growth.reproducible,
            "checkpoints every (steps, epochs)":
                keeper and [keeper.every_steps, keeper.every_epochs],
        }
        told = [json.loads(c) for c in self.ranks.gather(json.dumps(terms).encode())]
        for rank, other in enumerate(told):
            for name, value in other.items():
                if value != told[0][name]:
                    raise ContractError(f"{name}: {value} on rank {rank}, {told[0][name]} on rank "
                                        "0; give all ranks the same, for they move together")

    def due(self, keeper: Checkpoints | None, count: int, *, of_epoch: bool = False) -> bool:
        """Whether an automatic checkpoint is; a collective where one falls, for rank 0 writes it
        and knows whether it can."""
        return (keeper is not None and keeper.falls(count, of_epoch=of_epoch)
                and bool(self.ranks.from_first(keeper.free())))

    # -- in a step ------------------------------------------------------------------------

    def meet(self) -> None:
        """Before a tick: a kernel that all ranks have by now may join in it. A collective while
        one is on its way."""
        if self.loader is not None:
            self.loader.meet(patiently=self._growth.reproducible)

    def losses(self, own: Tensor) -> Tensor:
        """The mean over the ranks of every loss since the last look. By the way, what failed on one
        rank is made to fail on all, and it is checked that they have grown alike.

        Raises:
            RankError: they have not.
        """
        if self.ranks.size == 1:
            return own
        news = {s.number: str(s.failure) for s in self._seeds()
                if s.failure is not None and s not in self._told}
        grown = [self._growth.step, [(name, site.state, site.seed.number if site.seed else 0,
                                      [f.number for f in site.fossils])
                                     for name, site in self._growth.sites.items()]]
        mark = zlib.crc32(json.dumps(grown).encode())
        told = self.ranks.mean(torch.cat(
            [own.detach().to("cpu", torch.float64), torch.tensor([len(news), mark]).double()]))
        if float(told[-1]) != mark:
            raise RankError(
                f"rank {self.ranks.rank} has grown otherwise than the others by step "
                f"{self._growth.step}: {grown[1]}. Commands and settings of the growth must be the "
                "same on all ranks; leave deciding to the session's policy"
            )
        if float(told[-2]):
            self._fail_everywhere(news)
        return told[:-2]

    def _fail_everywhere(self, news: Mapping[int, str]) -> None:
        reasons: dict[str, str] = {}
        for rank, content in enumerate(self.ranks.gather(json.dumps(news).encode())):
            for number, reason in json.loads(content).items():
                reasons.setdefault(number, f"rank {rank}: {reason}")
        for seed in self._seeds():
            if reason := reasons.get(str(seed.number)):
                seed.fail(reason)
                self._told.add(seed)

    def failure(self, seed: Seed) -> KernelFailure | None:
        return seed.failure if seed in self._told else None

    def health(self, seed: Seed) -> Health:
        """The worst of all ranks; not measured where none did. A collective."""
        own = seed.health()
        given = (own.drift, own.grad_norm)
        worst = self.ranks.largest([-1.0 if v is None else math.inf if math.isnan(v) else v
                                    for v in given])
        drift, norm = (None if v < 0 else v for v in worst)
        seed.drift = drift if drift is not None else seed.drift
        return Health(drift=drift, grad_norm=norm)

    # -- at the epoch boundary ------------------------------------------------------------

    def begin_epoch(self) -> None:
        """All ranks measure one model: with the buffers of rank 0."""
        if self._gradients is not None:
            self._gradients.paused = True
            self.ranks.same([b for module in (self._parts.model, self._parts.ema)
                             if module is not None for b in module.buffers()
                             if not is_sharded(b)])

    def end_epoch(self) -> None:
        if self._gradients is not None:
            self._gradients.paused = False

    def held_out(self, loss_fn: LossFn, batches: Sequence[Any]) -> float:
        """The mean loss of all ranks' held-out batches."""
        own = mean_loss(self.model, loss_fn, batches)
        return float(self.ranks.mean(torch.tensor(own, dtype=torch.float64)))

    def agree(
        self, sites: tuple[SiteStatus, ...], evidence: dict[str, tuple[float, float, float]]
    ) -> tuple[SiteStatus, ...]:
        """What was measured, averaged over the ranks; not measured where one of them did not.
        `evidence` is changed in place."""
        if self.ranks.size == 1:
            return sites
        known: list[float | None] = [getattr(s, name) for s in sites for name in _MEASURED]
        traces = sorted(evidence)
        known += [v for trace in traces for v in evidence[trace]]
        values, there = self.ranks.mean(torch.tensor(
            [[v or 0.0 for v in known], [v is not None for v in known]],
            dtype=torch.float64)).tolist()
        agreed = iter([v if n == 1 else None for v, n in zip(values, there, strict=True)])
        changes: list[dict[str, Any]] = [{name: next(agreed) for name in _MEASURED} for _ in sites]
        for trace in traces:
            evidence[trace] = tuple(next(agreed) for _ in range(3))  # type: ignore[assignment]
        return tuple(replace(s, **change) for s, change in zip(sites, changes, strict=True))

    def wants(
        self, policy: Policy, state: SystemState, catalog: Catalog
    ) -> frozenset[str] | None:
        """The sites that the policy of rank 0 wants measured; None is all of them."""
        asked: Any = getattr(policy, "wants", None)
        told = sorted(asked(state, catalog)) if asked is not None and self.first else None
        told = self.ranks.from_first(told)
        return None if told is None else frozenset(told)

    def decide(self, policy: Policy, state: SystemState, catalog: Catalog) -> Decision:
        """The decision of rank 0, on all of them."""
        if self.ranks.size == 1:
            return policy.decide(state, catalog)
        decision, told = None, None
        if self.first:
            decision = policy.decide(state, catalog)
            told = {**vars(decision),
                    "commands": [c.model_dump(mode="json") for c in decision.commands],
                    "considered": [vars(c) for c in decision.considered],
                    "budgets": [vars(b) for b in decision.budgets]}
        told = self.ranks.from_first(told)
        if decision is None:
            decision = Decision(**{
                **told, "commands": tuple(Command.model_validate(c) for c in told["commands"]),
                "considered": tuple(Considered(**c) for c in told["considered"]),
                "budgets": tuple(Spent(**b) for b in told["budgets"])})
        return decision

    def close(self) -> None:
        if self._gradients is not None:
            self._gradients.close()


def _measured(model: nn.Module, parts: Parts, growth: Growth, ranks: Ranks) -> nn.Module:
    """What to measure with. Raises ContractError for what cannot be grown by several processes."""
    given = f"{ranks.size} processes train, and "
    if growth.fossils() or growth.active():
        raise ContractError(given + "the model has grown already, by itself; begin with a fresh "
                            "one, or resume from a checkpoint of it")
    if isinstance(model, DistributedDataParallel):
        if model.process_group.size() != ranks.size:
            raise ContractError(given + f"the model is reduced over {model.process_group.size()} "
                                "of them; only data parallelism over all of them is supported")
        inner: nn.Module = model.module
        return inner
    modules = sharded_modules(model)
    if model not in modules:
        raise ContractError(
            given + f"the session was given a {type(model).__name__}. Give it what was made of the "
            "wrapped model: DistributedDataParallel(model) (of a compiled one, too), or the model "
            "after fully_shard(model)")
    if growth.model is not model:
        raise ContractError(given + f"the {type(model).__name__} that was given is sharded and a "
                            f"{type(growth.model).__name__} in it is wrapped; wrap the whole")
    if growth.compiled or parts.scaler is not None or parts.ema is not None:
        raise ContractError(given + "the model is sharded: then it cannot be compiled, scaled by a "
                            "GradScaler or averaged (ema); use DistributedDataParallel for that")
    dtypes = {str(s.found.signature.dtype) for s in growth.sites.values()}
    for module in modules:
        dtype = module._get_fsdp_state()._mp_policy.param_dtype
        if dtype is not None and dtypes != {str(dtype).removeprefix("torch.")}:
            raise ContractError(given + f"fully_shard computes in {dtype} where the sites' kernels "
                                f"take {', '.join(sorted(dtypes))}; wrap a model of that type, or "
                                "leave MixedPrecisionPolicy's param_dtype out")
    ours = {id(p) for p in model.parameters()}
    for parameter in (p for g in parts.optimizer.param_groups for p in g["params"]):
        if id(parameter) not in ours:
            raise ContractError(given + "the optimizer has parameters that the sharded model has "
                                "not; make it after fully_shard")
        if is_sharded(parameter) and parameter.device_mesh.size() != ranks.size:
            raise ContractError(given + f"parameters are sharded over {parameter.device_mesh}; "
                                "only data parallelism over all processes is supported")
    return model
