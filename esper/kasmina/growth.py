"""Kasmina's desk: the sites of one model, the seeds at them, and the commands they obey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from esper.errors import ArtifactCorrupt, SiteError
from esper.kasmina.guards import DEFAULT_GUARDS, Guard
from esper.kasmina.loader import Loader, Ready
from esper.kasmina.parallel import check_not_parallel
from esper.kasmina.schedule import SCHEDULES
from esper.kasmina.seed import Seed, Vitals
from esper.kasmina.sites import Found, find_sites
from esper.kasmina.slot import Slot, is_compiled, uncompiled
from esper.leyline.command import Action, Command, Transition
from esper.leyline.lifecycle import ACTIVE, SeedState
from esper.leyline.signature import SiteKind

_NEXT = {
    SeedState.TRAINING: SeedState.GRAFTING,
    SeedState.STABILIZATION: SeedState.EVALUATING,
    SeedState.EVALUATING: SeedState.FINE_TUNING,
}
HEALTH_EVERY = 10  # steps between two samples of a seed's health


@dataclass
class Site:
    """One growth site: its fossilized seeds, and at most one on its way."""

    found: Found
    slot: Slot | None = None  # in a compiled host
    fossils: list[Seed] = field(default_factory=list)
    seed: Seed | None = None
    pending: Future[Ready] | None = None
    resting: SeedState = SeedState.DORMANT  # DORMANT, or why the last seed left
    last_trace: str = ""  # of the seed that left last
    embargo: int = 0  # epochs left before the site is DORMANT again

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def state(self) -> SeedState:
        return self.seed.state if self.seed is not None else self.resting


Observer = Callable[[Transition], None]


def check_device(found: Found, model: nn.Module, opened: torch.device) -> None:
    """Signatures say only "cuda", and kernels are opened on the first one.

    Raises:
        SiteError: the site, or the whole model where the site has no parameters, is on others.
    """
    devices = ({p.device for p in found.module.parameters()}
               or {p.device for p in model.parameters()})
    there = {d for d in devices if d.type == opened.type}
    if there and opened not in there:
        raise SiteError(
            f"site {found.name!r} is on {', '.join(map(str, there))}, its kernel was opened on "
            f"{opened}; let the process see only the GPU it trains on (CUDA_VISIBLE_DEVICES)"
        )


class Growth:
    """All growth of one model. Every change happens on the training thread, between steps.

    `on_join` and `on_leave` are told of parameters that appear and disappear (the optimizer's
    business); `observers` of every transition. `embargo_epochs` is how long a site rests
    after a seed left it. `model` is the model as it was written; with `compiled`, torch.compile
    works on it, and each site has a slot. With `reproducible`, a kernel is waited for at the step
    after its command, so that the step at which it joins does not depend on time.
    """

    def __init__(
        self, model: nn.Module, found: Sequence[Found], *, compiled: bool = False
    ) -> None:
        self.model, self.compiled = model, compiled
        self.sites = {f.name: Site(f, Slot(f) if compiled else None) for f in found}
        self.guards: tuple[Guard, ...] = DEFAULT_GUARDS
        self.graft_steps = 100
        self.schedule = "cosine"
        self.embargo_epochs = 5
        self.seed = 0
        self.reproducible = False
        self.step = 0
        self.epoch = 0
        self.observers: list[Observer] = []
        self.on_join: Callable[[list[nn.Parameter]], None] = lambda params: None
        self.on_leave: Callable[[list[nn.Parameter]], None] = lambda params: None
        self.on_failure: Callable[[Seed, str], None] = lambda seed, reason: None
        self.on_settled: Callable[[Seed, str], None] = lambda seed, reason: None
        self.germinated = 0
        self.vitals = Vitals()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, pickled or deep, computes as the model does and grows no more."""
        return type(None), ()

    # -- looking --------------------------------------------------------------------------

    def active(self) -> list[Seed]:
        """Seeds on their way, loading ones included."""
        return [s.seed for s in self.sites.values() if s.seed is not None]

    def fossils(self) -> list[Seed]:
        return [f for s in self.sites.values() for f in s.fossils]

    # -- commands -------------------------------------------------------------------------

    def obey(self, command: Command, loader: Loader | None = None) -> None:
        """Carry out one command.

        Raises:
            SiteError: no such site, or nothing to command there.
            IllegalTransition: the seed's state does not allow it; nothing is changed.
        """
        site = self.sites.get(command.site)
        if site is None:
            raise SiteError(f"no site {command.site!r}; there are: {', '.join(self.sites)}")
        if command.action is Action.GERMINATE:
            self._germinate(site, command, loader)
            return
        seed = site.seed
        if seed is None:
            raise SiteError(f"site {site.name!r} is {site.state}, there is no seed to command")
        match command.action:
            case Action.ADVANCE:
                after = _NEXT.get(seed.state, SeedState.FOSSILIZED)
            case Action.FOSSILIZE:
                after = SeedState.FOSSILIZED
            case Action.CULL:
                after = SeedState.CULLED
            case Action.CANCEL:
                after = SeedState.CANCELLED
        self._move(site, seed, after, command.reason)

    def _germinate(self, site: Site, command: Command, loader: Loader | None) -> None:
        if site.state is not SeedState.DORMANT:
            raise SiteError(f"site {site.name!r} is {site.state}; only a DORMANT one germinates")
        if loader is None or command.kernel_id is None or command.blueprint_id is None:
            raise SiteError("germination needs a loader, a kernel_id and a blueprint_id")
        self.germinated += 1
        seed = Seed(
            site.found, command.kernel_id, command.blueprint_id, command.trace_id,
            number=self.germinated, schedule=SCHEDULES[self.schedule],
            graft_steps=self.graft_steps, slot=site.slot,
        )
        site.seed = seed
        site.pending = loader.prefetch(
            command.kernel_id, site.found.signature, self.seed + self.germinated
        )
        self._tell(seed, SeedState.DORMANT, SeedState.GERMINATED, command.reason)

    # -- time -----------------------------------------------------------------------------

    def tick(self) -> bool:
        """A step is over: swap in what is ready, move alphas, let guards speak.

        Returns True where anything joined, left or changed state.
        """
        self.step += 1
        changed = False
        for site in self.sites.values():
            seed = site.seed
            if seed is not None:
                changed |= self._tick(site, seed)
            for fossil in site.fossils:
                if (why := self.vitals.failure(fossil)) is not None and not fossil.failure_told:
                    fossil.failure_told = True
                    self.on_failure(fossil, str(why))
        return changed

    def _tick(self, site: Site, seed: Seed) -> bool:
        if (why := self.vitals.failure(seed)) is not None:
            self.on_failure(seed, str(why))
            self._move(site, seed, SeedState.CULLED, str(why))
            return True
        if site.pending is not None:
            ready = self.reproducible or site.pending.done()
            return ready and self._swap_in(site, seed, site.pending)
        if seed.state in (SeedState.GRAFTING, SeedState.STABILIZATION):
            if self.step % HEALTH_EVERY == HEALTH_EVERY - 1:
                seed.sample_health()
            elif self.step % HEALTH_EVERY == 0:
                health = self.vitals.health(seed)
                for guard in self.guards:
                    if reason := guard(health):
                        self._move(site, seed, SeedState.CULLED, reason)
                        return True
        if seed.tick():
            self._move(site, seed, SeedState.STABILIZATION, "alpha reached 1")
            return True
        return False

    def _swap_in(self, site: Site, seed: Seed, pending: Future[Ready]) -> bool:
        site.pending = None
        try:
            ready = pending.result()
            values = ready.params()
            for value in values[:1]:
                check_device(site.found, self.model, value.device)
            seed.install(ready.kernel, values)
            self.on_join(list(seed.params))
        except Exception as e:  # a refusal of the slow track never reaches the training loop
            reason = f"kernel could not be {'taken in' if seed.params else 'loaded'}: {e}"
            # A full disk or a library that does not answer says nothing about the kernel.
            if isinstance(e, ArtifactCorrupt):
                self.on_failure(seed, reason)
            self._move(site, seed, SeedState.CULLED, reason)
            return True
        self._move(site, seed, SeedState.TRAINING, "kernel fetched, verified and opened")
        return True

    def end_epoch(self) -> None:
        """An epoch is over: seeds age, embargoes run down."""
        self.epoch += 1
        for site in self.sites.values():
            if site.seed is not None:
                site.seed.epochs_in_state += 1
            elif site.embargo:
                site.embargo -= 1
                if site.embargo == 0:
                    self._rest_over(site)

    def roll_back(self, reason: str) -> None:
        """Send every seed on its way to ROLLED_BACK; fossils stay."""
        for site in self.sites.values():
            if site.seed is not None and site.seed.state in ACTIVE:
                self._move(site, site.seed, SeedState.ROLLED_BACK, reason)

    # -- bookkeeping ----------------------------------------------------------------------

    def _move(self, site: Site, seed: Seed, after: SeedState, reason: str) -> None:
        before = seed.move(after)
        if after is SeedState.FOSSILIZED:
            site.fossils.append(seed)
            site.seed = None
            site.resting = SeedState.DORMANT  # the fossil is final; the place is free again
        elif after in (SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK):
            if site.pending is not None:
                site.pending.cancel()
                site.pending = None
            self.on_leave(list(seed.params))
            seed.remove()
            site.seed, site.last_trace = None, seed.trace_id
            site.resting, site.embargo = after, self.embargo_epochs
        self._tell(seed, before, after, reason)
        if after not in ACTIVE:
            self.on_settled(seed, reason)
            if site.resting is not SeedState.DORMANT and site.embargo == 0:
                self._rest_over(site)

    def _rest_over(self, site: Site) -> None:
        before, site.resting = site.resting, SeedState.DORMANT
        self._emit(
            Transition(trace_id=site.last_trace, site=site.name, kernel_id=None, before=before,
                       after=SeedState.DORMANT, trigger="embargo is over",
                       step=self.step, epoch=self.epoch)
        )

    def _tell(self, seed: Seed, before: SeedState, after: SeedState, trigger: str) -> None:
        self._emit(
            Transition(trace_id=seed.trace_id, site=seed.site.name, kernel_id=seed.kernel_id,
                       before=before, after=after, trigger=trigger,
                       step=self.step, epoch=self.epoch)
        )

    def _emit(self, transition: Transition) -> None:
        for observer in self.observers:
            observer(transition)


# Where a wrapped model keeps its growth: on itself, so that both go together. Hooks of a session
# lead from the growth back to the model, and a table of growths would keep every model alive.
_ATTRIBUTE = "_esper_growth"


def wrap(
    model: nn.Module,
    sites: Sequence[str] | str = "auto",
    *,
    example: Any = None,
    kind: SiteKind | None = None,
    causal: bool = False,
    compiled: bool = False,
) -> nn.Module:
    """Name where `model` may grow, and return it.

    The model computes as before until a seed germinates: no hook, no wrapper, no parameter. One
    that is compiled, by `torch.compile(model)` or `model.compile()`, is different: its graph has
    to hold a place for seeds before there are any. Each of its sites gets a hook with one
    operator, once; seeds then come and go behind it without a compilation. What was compiled so
    far, in the whole process, is compiled again when it is next called, for a graph does not
    notice new hooks: wrap before the first step.

    In a compiled model, and for a seed in TRAINING in any, the gradients of the seeds' parameters
    are added to their `.grad` by esper itself: `torch.autograd.grad` does not see them. For several
    processes, wrap first and make the model parallel then: see docs/data_parallel.md.

    Args:
        sites: module names, shell patterns ("layer*.1"), or "auto" for `suggest_sites`. Names are
            those of the model as it was written, without torch.compile's prefix.
        example: one input batch, a tuple of positional arguments or a mapping of named ones, to
            see shapes with. It may be left out where every site is a layer that declares its width.
        kind: say which layout the sites have, where it cannot be told from the rank.
        causal: token sites belong to an autoregressive model and must not look ahead.
        compiled: say so where it cannot be seen from the model, because the model will be
            compiled later, or is called inside a function that is.

    Raises:
        SiteError: a site does not exist or cannot be grown, with the reason; or the model is
            wrapped already, or parallel; or it is compiled and esper's extension is not there.
    """
    check_not_parallel(model)
    plain, compiled = _plain(model), compiled or is_compiled(model)
    if growths := _growths_in(plain):
        name = next(iter(growths))
        raise SiteError(f"{f'its module {name!r}' if name else 'the model'} is wrapped already; "
                        "esper.unwrap(model) first")
    with uncompiled(compiled):
        found = find_sites(plain, sites, example, kind=kind, causal=causal)
    if compiled:
        torch.compiler.reset()  # a graph that is there already would not notice new hooks
    plain.__dict__[_ATTRIBUTE] = Growth(plain, found, compiled=compiled)
    return model


def growth_of(model: nn.Module) -> Growth:
    """The growth of a wrapped model, or of the wrapped module that a model holds.

    Raises:
        SiteError: the model is not wrapped, or was compiled after it was wrapped.
    """
    growths = _growths_in(_plain(model))
    if not growths:
        raise SiteError("the model is not wrapped; call esper.wrap(model, ...) first")
    if len(growths) > 1:
        raise SiteError(f"several modules of the model are wrapped: {', '.join(growths)}; name one "
                        "of them, or wrap the whole model once")
    (growth,) = growths.values()
    if is_compiled(model) and not growth.compiled:
        raise SiteError(
            "the model was wrapped first and compiled later, so its graph has no place for seeds; "
            "wrap what torch.compile returned, or wrap with compiled=True"
        )
    return growth


def unwrap(model: nn.Module) -> nn.Module:
    """Give the model back as it was before `wrap`: every seed and its parameters leave.

    To keep what has grown, use `export`. A compiled model is compiled again, without slots, when
    it is next called.
    """
    growth = growth_of(model)
    if growth.compiled:
        torch.compiler.reset()
    for site in growth.sites.values():
        for seed in ([site.seed] if site.seed else []) + site.fossils:
            growth.on_leave(list(seed.params))
            seed.remove()
        if site.pending is not None:
            site.pending.cancel()
        if site.slot is not None:
            site.slot.close()
        site.seed, site.fossils, site.pending, site.slot = None, [], None, None
    del growth.model.__dict__[_ATTRIBUTE]
    return model


def _growths_in(model: nn.Module) -> dict[str, Growth]:
    """By the name of the module that was wrapped; "" for the model itself."""
    found = {n: m.__dict__.get(_ATTRIBUTE) for n, m in model.named_modules()}
    return {name: growth for name, growth in found.items() if growth is not None}


def _plain(model: nn.Module) -> nn.Module:
    """The model as it was written, behind what torch.compile made of it."""
    plain: nn.Module = getattr(model, "_orig_mod", model)
    return plain
