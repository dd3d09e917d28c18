"""A session: growth for people with their own training loop.

    session = esper.Session(model, optimizer, loss_fn=loss_fn, holdout=batches, library=library)
    for epoch in range(epochs):
        for batch in loader:
            loss = loss_fn(model, batch)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            session.step(loss)
        session.epoch()
    session.close()
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import ArtifactMismatch, ContractError, EsperError
from esper.kasmina.artifact import check_runs_here
from esper.kasmina.growth import growth_of
from esper.kasmina.loader import Loader
from esper.kasmina.seed import Seed
from esper.leyline.base import Contract
from esper.leyline.command import Action, FieldReport
from esper.leyline.events import Event, Priority, Topic, new_id
from esper.leyline.library import KernelRecord, Library
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.catalog import CatalogWatch
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, Decision, Policy, SiteStatus, SystemState
from esper.tolaria.measure import LossFn, counterfactual_gain, mean_loss, site_scores
from esper.tolaria.optimizer import OptimizerSurgeon
from esper.tolaria.snapshot import Snapshot
from esper.tolaria.telemetry import Considerations, outgoing, seed_health

log = logging.getLogger(__name__)

_MEASURED = (SeedState.TRAINING, SeedState.EVALUATING, SeedState.FINE_TUNING)
_INFLUENTIAL = (SeedState.GRAFTING, SeedState.STABILIZATION, SeedState.EVALUATING,
                SeedState.FINE_TUNING)


@dataclass(frozen=True)
class EpochSummary:
    """What one epoch boundary saw and decided; losses in the units of the run's loss.

    `sites` is what the policy was shown, before its commands were carried out.
    """

    epoch: int
    step: int
    train_loss: float | None
    holdout_loss: float
    decision: Decision
    sites: tuple[SiteStatus, ...]
    decision_seconds: float
    rolled_back: bool


class Session:
    """Binds a wrapped model, its optimizer, a policy and a library. Owned by one thread.

    Args:
        loss_fn: (model, batch) -> scalar loss with a graph. On a GPU losses are looked at every
            20 steps, for looking makes the host wait for the device.
        holdout: batches that are not trained on; decisions are made on them, so the figures
            reported at the end should come from yet other data.
        library: None for a run that can only be guarded, not grown.
        explosion: a loss over this many times the largest of the last 50 is rolled back, as is
            NaN. (Not their median: late in a run single batches differ by more than that.)
        observers: called with every Transition, Command, FieldReport and Event, between
            steps; must not block.

    Raises:
        SiteError: the model is not wrapped.
        ContractError: no held-out batch was given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: LossFn,
        holdout: Sequence[Any],
        library: Library | None = None,
        policy: Policy | None = None,
        scheduler: Any = None,
        lr_scale: float = 1.0,
        run_id: str | None = None,
        explosion: float = 10.0,
        max_rollbacks: int = 3,
        observers: Sequence[Callable[[Contract], None]] = (),
    ) -> None:
        if not holdout:
            raise ContractError("holdout is empty; give at least one batch that is not trained on")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.growth = growth_of(model)
        self.policy: Policy = policy if policy is not None else HeuristicPolicy()
        self.run_id = run_id or new_id("run")
        self.observers = list(observers)
        self.rollbacks = 0
        self.growth_steps: list[int] = []
        self._loss_fn, self._holdout, self._library = loss_fn, holdout, library
        self._explosion, self._max_rollbacks = explosion, max_rollbacks
        surgeon = OptimizerSurgeon(optimizer, scheduler, lr_scale)
        self.growth.on_join, self.growth.on_leave = surgeon.join, surgeon.leave
        self.growth.on_failure, self.growth.on_settled = self._failed, self._settled
        self.growth.observers.append(self._publish)
        self._recent: deque[float] = deque(maxlen=50)
        self._unseen: list[Tensor] = []  # losses not yet looked at
        self._check_every = 1 if _device(model) == "cpu" else 20
        self._epoch_losses: list[float] = []
        self._train_losses: list[float] = []
        self._holdout_losses: list[float] = []
        self._evidence: dict[str, tuple[float, float, float]] = {}  # by trace_id
        self._born: dict[str, int] = {}
        self._used: dict[str, set[str]] = {}
        self._rolled_back = False
        self._watch: CatalogWatch | None = None
        self._loader: Loader | None = None
        self._considerations = Considerations()
        self._outgoing = outgoing(library)
        if self._outgoing is not None:
            self.observers.append(self._outgoing)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="esper-writer")
        if library is not None:
            signatures = [s.found.signature for s in self.growth.sites.values()]
            for signature in dict.fromkeys(signatures):
                library.register_signature(signature)
            self._watch = CatalogWatch(library, signatures, why_not=_why_not_here)
            self._loader = Loader(library)
        self._snapshot = self._capture()

    # -- the fast track -------------------------------------------------------------------

    def step(self, loss: Tensor) -> bool:
        """Tell the session that one optimizer step is done, with its loss.

        Returns False where the loss was NaN, infinite or exploded and the run was put back to
        its last snapshot; the batch is spent then.

        Raises:
            EsperError: the run went wrong `max_rollbacks` times since the last good epoch.
        """
        self._unseen.append(loss.detach())
        if len(self._unseen) < self._check_every:
            return self._tick()
        # One synchronization for all losses since the last look.
        return self._look() and self._tick()

    def _look(self) -> bool:
        """Look at the losses not yet seen; False where one of them rolled the run back."""
        values = torch.stack(self._unseen).tolist() if self._unseen else []
        self._epoch_losses += values
        self._unseen.clear()
        for value in values:
            if not math.isfinite(value) or self._exploded(value):
                self._roll_back(value)
                return False
            self._recent.append(value)
        return True

    def _tick(self) -> bool:
        if self.growth.tick():
            self.growth_steps.append(self.growth.step)
        return True

    def _exploded(self, value: float) -> bool:
        if len(self._recent) < 20:
            return False
        return value > self._explosion * max(self._recent)

    def _roll_back(self, value: float, what: str = "loss") -> None:
        self.rollbacks += 1
        self._rolled_back = True
        reason = f"{what} {value:g} at step {self.growth.step}; largest of the recent ones " + (
            f"{max(self._recent):.4g}" if self._recent else "not known")
        started = time.perf_counter()
        self.growth.roll_back(reason)
        self._snapshot.restore(self.model, self.optimizer, self.scheduler)
        self._recent.clear()
        self._epoch_losses.clear()
        self._publish(Event(topic=Topic.ROLLBACK, sender="tolaria", priority=Priority.EMERGENCY,
                            body={"run_id": self.run_id, "reason": reason,
                                  "step": self.growth.step,
                                  "seconds": time.perf_counter() - started}))
        if self.rollbacks > self._max_rollbacks:
            raise EsperError(
                f"{reason}; rolled back {self._max_rollbacks} times since the last good epoch. "
                "Lower the learning rate or look at the data of this step"
            )

    # -- the epoch boundary ---------------------------------------------------------------

    def epoch(self) -> EpochSummary:
        """End an epoch: measure, decide, obey, take a snapshot.

        A held-out loss that is NaN or infinite is rolled back too: a step whose loss was still
        fine may have left such weights.

        Raises:
            EsperError: as `step`.
        """
        self.growth.end_epoch()
        self._look()
        holdout = mean_loss(self.model, self._loss_fn, self._holdout)
        if not math.isfinite(holdout):
            self._roll_back(holdout, "held-out loss")
            holdout = mean_loss(self.model, self._loss_fn, self._holdout)
        train = fmean(self._epoch_losses) if self._epoch_losses else None
        self._epoch_losses.clear()
        if train is not None:
            self._train_losses.append(train)
        self._holdout_losses.append(holdout)
        sites = self._statuses()
        for event in seed_health(self.growth, sites, self.run_id):
            self._publish(event)
        state = SystemState(
            epoch=self.growth.epoch,
            train_losses=tuple(self._train_losses),
            holdout_losses=tuple(self._holdout_losses),
            sites=sites,
            grown_parameters=sum(p.numel() for s in self._all_seeds() for p in s.params),
            growths=len(self.growth.fossils()) + len(self.growth.active()),
        )
        started = time.perf_counter()
        decision = self.policy.decide(state, self._watch.current if self._watch else Catalog())
        seconds = time.perf_counter() - started
        self._carry_out(decision)
        rolled_back, self._rolled_back = self._rolled_back, False
        if not rolled_back:
            self.rollbacks = 0
        blending = any(s.state in _INFLUENTIAL for s in self.growth.active())
        # A snapshot with a half-blended seed in it would not be one to go back to.
        if not blending and math.isfinite(holdout):
            self._snapshot = self._capture()
        summary = EpochSummary(self.growth.epoch, self.growth.step, train, holdout, decision,
                               sites, seconds, rolled_back)
        self._publish(Event(topic=Topic.EPOCH, sender="tolaria", body={
            "run_id": self.run_id, "epoch": summary.epoch, "step": summary.step,
            "train_loss": train, "holdout_loss": holdout, "decision_seconds": seconds}))
        return summary

    def _carry_out(self, decision: Decision) -> None:
        if news := self._considerations.news(decision):
            # Under the trace of what came of it, so that one id leads from the choice on.
            chosen = (c.trace_id for c in decision.commands if c.action is Action.GERMINATE)
            self._publish(Event(
                topic=Topic.COMMANDS, sender="tamiyo", trace_id=next(chosen, new_id("tr")),
                body=news))
        for command in decision.commands:
            self._publish(command)
            try:
                self.growth.obey(command, self._loader)
            except EsperError as e:
                log.warning("command %s at %s refused: %s", command.action, command.site, e)
                continue
            self.growth_steps.append(self.growth.step)
            if command.blueprint_id is not None:
                self._used.setdefault(command.site, set()).add(command.blueprint_id)
                self._born[command.trace_id] = self.growth.epoch

    def _statuses(self) -> tuple[SiteStatus, ...]:
        scores: dict[str, float] = {}
        dormant = any(s.state is SeedState.DORMANT for s in self.growth.sites.values())
        if dormant and self._library is not None:
            scores = site_scores(self.model, self.growth, self._loss_fn, self._holdout[0])
        result = []
        for name, site in self.growth.sites.items():
            seed, gain = site.seed, None
            if seed is not None and seed.state in _MEASURED:
                evidence = counterfactual_gain(self.model, self._loss_fn, self._holdout, seed)
                self._evidence[seed.trace_id] = evidence
                gain = evidence[0]
            result.append(SiteStatus(
                name=name, signature=site.found.signature, state=site.state,
                epochs_in_state=seed.epochs_in_state if seed else 0,
                trace_id=seed.trace_id if seed else "",
                kernel_id=seed.kernel_id if seed else None,
                gain=gain, score=scores.get(name), fossils=len(site.fossils),
                used_blueprints=frozenset(self._used.get(name, ())),
            ))
        return tuple(result)

    # -- consequences ---------------------------------------------------------------------

    def _all_seeds(self) -> list[Seed]:
        return self.growth.fossils() + self.growth.active()

    def _capture(self) -> Snapshot:
        without = {id(p) for s in self.growth.active() for p in s.params}
        return Snapshot(self.model, self.optimizer, self.scheduler, without)

    def _failed(self, seed: Seed, reason: str) -> None:
        self._in_background("quarantine", lambda lib: lib.quarantine(seed.kernel_id, reason))

    def _settled(self, seed: Seed, reason: str) -> None:
        evidence = self._evidence.pop(seed.trace_id, None)
        report = FieldReport(
            run_id=self.run_id, trace_id=seed.trace_id, site=seed.site.name,
            kernel_id=seed.kernel_id, blueprint_id=seed.blueprint_id, outcome=seed.state,
            reason=reason, gain=evidence[0] if evidence else None,
            loss_before=evidence[1] if evidence else None,
            loss_after=evidence[2] if evidence else None,
            epochs=self.growth.epoch - self._born.get(seed.trace_id, self.growth.epoch),
        )
        if seed.state is SeedState.FOSSILIZED:
            # A fossil stays, so every state to go back to must have it, whatever else is
            # being blended in just now.
            self._snapshot = self._capture()
        self._publish(report)
        self._in_background("field report", lambda lib: lib.add_report(report))

    def _in_background(self, what: str, work: Callable[[Library], None]) -> None:
        """The library is written off the training thread; a failure there is logged, no more."""
        library = self._library
        if library is None:
            return

        def run() -> None:
            try:
                work(library)
            except Exception:
                log.warning("%s was not written to the library", what, exc_info=True)

        self._writer.submit(run)

    def _publish(self, record: Contract) -> None:
        for observer in self.observers:
            observer(record)

    @property
    def catalog(self) -> Catalog:
        """The library as last seen."""
        return self._watch.current if self._watch else Catalog()

    def close(self) -> None:
        """Stop the background threads; waits for what is being written."""
        if self._watch is not None:
            self._watch.close()
        if self._loader is not None:
            self._loader.close()
        if self._outgoing is not None:
            self._outgoing.close()
        self._writer.shutdown(wait=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _why_not_here(kernel: KernelRecord) -> str:
    try:
        check_runs_here(kernel.manifest)
    except ArtifactMismatch as e:
        return str(e)
    return ""


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")
