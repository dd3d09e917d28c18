"""A session: growth for people with their own training loop.

    session = esper.Session(model, optimizer, loss_fn=loss_fn, holdout=batches, library=library)
    for epoch in range(epochs):
        for batch in loader:
            loss = loss_fn(model, batch)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            session.step(loss)  # the last thing of a step
        session.epoch()
    session.close()

A run that was interrupted goes on where its checkpoint was taken, see docs/checkpoints.md:

    session = esper.Session.resume(folder, model, optimizer, loss_fn=loss_fn, ...)
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import ContractError, EsperError
from esper.kasmina.growth import growth_of
from esper.kasmina.seed import Seed
from esper.leyline.base import Contract
from esper.leyline.command import Action
from esper.leyline.events import Event, Topic, new_id
from esper.leyline.library import Library
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, Decision, Policy, SystemState
from esper.tolaria import telemetry
from esper.tolaria.ema import Average
from esper.tolaria.field import field_report, germinated
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.library import LibraryLink
from esper.tolaria.losses import LossWatch
from esper.tolaria.measure import LossFn, grown, look_at, survey
from esper.tolaria.optimizer import OptimizerSurgeon, why_not
from esper.tolaria.resume import Stateful, keep, restore, take
from esper.tolaria.snapshot import Parts, Snapshot
from esper.tolaria.steps import StepWatch
from esper.tolaria.summary import EpochSummary
from esper.tolaria.team import Team

log = logging.getLogger(__name__)

_INFLUENTIAL = (SeedState.GRAFTING, SeedState.STABILIZATION, SeedState.EVALUATING,
                SeedState.FINE_TUNING)


class Session:
    """Binds a wrapped model, its optimizer, a policy and a library. Owned by one thread.

    Where several processes train, each has one, of the parallel model: docs/data_parallel.md.

    Args:
        optimizer: torch's, or what Accelerate made of it: then only calls of `step` count that
            came after a step of the optimizer, so gradients may be accumulated.
        loss_fn: (model, batch) -> scalar loss with a graph. On a GPU, and where several processes
            train, losses are looked at every 20 steps, for looking waits for the others.
        holdout: batches that are not trained on; decisions are made on them, so the figures
            reported at the end should come from yet other data.
        library: None for a run that can only be guarded, not grown.
        lr_scale, warm_up: new parameters learn at `lr_scale` times the first group's rate, and
            over their first `warm_up` steps at a part of it that rises in equal steps.
        scaler, ema: a GradScaler, and a module that averages the model's weights. Both are rolled
            back and saved with the run; the average grows with the model. A step that the scaler
            leaves out, for gradients that are not finite, counts as none: nothing is looked at.
        explosion, max_rollbacks: see `LossWatch`; after so many rollbacks since the last good
            epoch the run ends.
        checkpoints: where and when to save the run by itself.
        reproducible: nothing that is decided depends on time: kernels are waited for, and the
            library is read at the boundary and not in the background. Costs pauses.
        observers: called with every Transition, Command, FieldReport and Event, between
            steps; must not block.

    Raises:
        SiteError: the model is not wrapped.
        ContractError: no held-out batch was given; nothing can join this optimizer; the average
            is of another model.
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
        warm_up: int = 0,
        scaler: Any = None,
        ema: nn.Module | None = None,
        run_id: str | None = None,
        explosion: float = 10.0,
        max_rollbacks: int = 3,
        checkpoints: Checkpoints | None = None,
        reproducible: bool = False,
        observers: Sequence[Callable[[Contract], None]] = (),
    ) -> None:
        if not holdout:
            raise ContractError("holdout is empty; give at least one batch that is not trained on")
        self._steps = StepWatch(optimizer, scaler)
        optimizer, scaler = self._steps.optimizer, self._steps.scaler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's
        if library is not None and (reason := why_not(optimizer)):
            raise ContractError(f"{reason}; train with another optimizer, or without a library, "
                                "guarded but not grown")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.growth = growth_of(model)
        self.parts = Parts(self.growth.model, optimizer, scheduler, scaler, ema)
        self.growth.reproducible = reproducible
        self._team = Team(model, self.parts, self.growth)
        self.policy: Policy = policy if policy is not None else HeuristicPolicy()
        self.run_id = self._team.ranks.from_first(run_id or new_id("run"))
        self.checkpoints = checkpoints
        self.observers = list(observers)
        self.rollbacks = 0
        self.growth_steps: list[int] = []
        self.batch = 0  # steps since the last epoch boundary
        self.planned_epochs: int | None = None  # how long the run is to be, where it is known
        self._loss_fn, self._holdout, self._library = loss_fn, holdout, library
        self._max_rollbacks = max_rollbacks
        self._surgeon = OptimizerSurgeon(optimizer, scheduler, lr_scale, warm_up)
        self.growth.on_join, self.growth.on_leave = self._surgeon.join, self._surgeon.leave
        self.growth.on_failure, self.growth.on_settled = self._failed, self._settled
        self.growth.observers.append(self._publish)
        self._average = Average(self.growth, ema) if ema is not None else None
        if self._average is not None:
            self.growth.observers.append(self._average.moved)
        self._losses = LossWatch(explosion, self._team.look_every, self._team.losses)
        self._train_losses: list[float] = []
        self._holdout_losses: list[float] = []
        self._evidence: dict[str, tuple[float, float, float]] = {}  # by trace_id
        self._born: dict[str, int] = {}
        self._used: dict[str, set[str]] = {}
        self._contexts: dict[str, dict[str, Any]] = {}  # SeedContexts by trace_id, as JSON
        self._rolled_back = False
        self._stateful: dict[str, Stateful] = {}
        self._unclaimed: dict[str, Any] = {}  # states of a checkpoint that nobody asked for yet
        self._team.compare(len(holdout), library is not None, checkpoints)
        self._link = LibraryLink(library, [s.found.signature for s in self.growth.sites.values()],
                                 only_kernels=not self._team.first)
        self._watch, self._loader = self._link.watch, self._team.shared(self._link.loader)
        self._considerations = telemetry.Considerations()
        if self._link.outgoing is not None:
            self.observers.append(self._link.outgoing)
        self._snapshot = Snapshot(self.parts, self._on_their_way())
        self._as_captured = True  # nothing happened since the snapshot
        self._spare: Snapshot | None = None  # memory for the next checkpoint

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **options: Any
    ) -> Session:
        """A session that goes on from a checkpoint, or from the newest of a folder of them.

        `model` is fresh, and wrapped at the same sites; `optimizer`, scheduler, scaler and average
        are fresh ones of the same kind. `options` are those of `Session`. Every seed comes back in
        its state, with its kernel from the library or, with a warning, in plain torch.

        Raises:
            CheckpointError: it is torn or foreign (the message names the newest good one), or does
                not fit what was given.
        """
        session = cls(model, optimizer, **options)
        try:
            restore(session, path)
        except BaseException:
            session.close()
            raise
        return session

    def register(self, name: str, part: Stateful) -> None:
        """Save `part` along with the run; in a resumed run, give it its state back now.

        For whatever has `state_dict` and `load_state_dict`: a loader that knows its position, say.
        """
        self._stateful[name] = part
        if name in self._unclaimed:
            part.load_state_dict(self._unclaimed.pop(name))

    def save(self, path: str | os.PathLike[str]) -> Future[Path]:
        """Write a checkpoint. Returns once the state is copied; the future is done when it is
        durable, or raises CheckpointError; that of another rank than 0 says nothing. To be called
        between steps, on all ranks."""
        self._look()
        return self._link.writer.submit(take(self), Path(path))

    def end_of_epoch(self, *, last: bool = False) -> None:
        """Write the automatic checkpoint of an epoch, if one is due, or it is the `last` of the
        run. `epoch` does it itself unless it was told not to."""
        if last or self._team.due(self.checkpoints, self.growth.epoch, of_epoch=True):
            keep(self)

    # -- the fast track -------------------------------------------------------------------

    def step(self, loss: Tensor) -> bool:
        """Tell the session that one optimizer step is done, with its loss.

        With a scaler, or Accelerate's optimizer, a call that no step came before does nothing.

        Returns False where the loss was NaN, infinite or exploded and the run was put back to
        its last snapshot; the batch is spent then.

        Raises:
            EsperError: the run went wrong `max_rollbacks` times since the last good epoch.
        """
        self.batch += 1
        self._as_captured = False
        if not self._steps.stepped():
            return True
        # Never a checkpoint of a state whose loss nobody has looked at.
        saving = self._team.due(self.checkpoints, self.growth.step + 1)
        if (self._losses.add(loss) or saving) and not self._look():
            return False
        self._team.meet()
        if self.growth.tick():
            self.growth_steps.append(self.growth.step)
        if self._average is not None:
            self._average.follow()
        if saving:
            keep(self)
        return True

    def _look(self) -> bool:
        """Look at the losses not yet seen; False where one of them rolled the run back."""
        if (bad := self._losses.look()) is None:
            return True
        self._roll_back(bad)
        return False

    def _roll_back(self, value: float, what: str = "loss") -> None:
        self.rollbacks += 1
        self._rolled_back = True
        recent = self._losses.recent
        reason = f"{what} {value:g} at step {self.growth.step}; largest of the recent ones " + (
            f"{max(recent):.4g}" if recent else "not known")
        started = time.perf_counter()
        self.growth.roll_back(reason)
        self._snapshot.restore(self.parts)
        self._losses.forget()
        seconds = time.perf_counter() - started
        self._publish(telemetry.rollback_event(self.run_id, reason, self.growth.step, seconds))
        if self.rollbacks > self._max_rollbacks:
            raise EsperError(
                f"{reason}; rolled back {self._max_rollbacks} times since the last good epoch. "
                "Lower the learning rate or look at the data of this step"
            )

    # -- the epoch boundary ---------------------------------------------------------------

    def epoch(self, *, save: bool = True) -> EpochSummary:
        """End an epoch: measure, decide, obey, take a snapshot.

        With `save=False` a checkpoint that is due is left to `end_of_epoch`, for loops that have
        something left to do in this epoch.

        A held-out loss that is NaN or infinite is rolled back too: a step whose loss was still
        fine may have left such weights.

        Raises:
            EsperError: as `step`.
        """
        self.growth.end_epoch()
        self.batch = 0
        self._look()
        self._team.begin_epoch()
        holdout = self._team.held_out(self._loss_fn, self._holdout)
        if not math.isfinite(holdout):
            self._roll_back(holdout, "held-out loss")
            holdout = self._team.held_out(self._loss_fn, self._holdout)
        train = fmean(self._losses.of_epoch) if self._losses.of_epoch else None
        self._losses.of_epoch.clear()
        if train is not None:
            self._train_losses.append(train)
        self._holdout_losses.append(holdout)
        state = SystemState(
            epoch=self.growth.epoch,
            train_losses=tuple(self._train_losses),
            holdout_losses=tuple(self._holdout_losses),
            sites=survey(self.growth, self._used),
            planned_epochs=self.planned_epochs,
            **grown(self._all_seeds()),
        )
        catalog = self._link.catalog(self.run_id, now=self.growth.reproducible)
        started = time.perf_counter()
        wanted = self._team.wants(self.policy, state, catalog)
        seconds = time.perf_counter() - started
        sites, passes = look_at(
            self._team.model, self.growth, self._loss_fn, self._holdout, state.sites, holdout,
            self._evidence, wanted=wanted, scored=self._library is not None)
        sites = self._team.agree(sites, self._evidence)
        self._team.end_epoch()
        for event in telemetry.seed_health(self.growth, sites, self.run_id):
            self._publish(event)
        state = replace(state, sites=sites)
        started = time.perf_counter()
        decision = self._team.decide(self.policy, state, catalog)
        seconds += time.perf_counter() - started
        self._carry_out(decision, state, catalog)
        rolled_back, self._rolled_back = self._rolled_back, False
        if not rolled_back:
            self.rollbacks = 0
        blending = any(s.state in _INFLUENTIAL for s in self.growth.active())
        # A snapshot with a half-blended seed in it would not be one to go back to.
        if not blending and math.isfinite(holdout):
            self._capture()
        summary = EpochSummary(self.growth.epoch, self.growth.step, train, holdout, decision,
                               sites, seconds, rolled_back, passes)
        self._publish(telemetry.epoch_event(self.run_id, summary))
        if save:
            self.end_of_epoch()
        return summary

    def _carry_out(self, decision: Decision, state: SystemState, catalog: Catalog) -> None:
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
                germinated(self, command, state, catalog)

    # -- consequences ---------------------------------------------------------------------

    def _all_seeds(self) -> list[Seed]:
        return self.growth.fossils() + self.growth.active()

    def _capture(self) -> None:
        """Take the state of this moment as the one to go back to."""
        self._snapshot = Snapshot(self.parts, self._on_their_way(), self._snapshot)
        self._as_captured = True

    def _on_their_way(self) -> set[int]:
        params = [p for s in self.growth.active() for p in s.params]
        if self._average is not None:
            params += [p for s in self.growth.active() for p in self._average.parameters_of(s)]
        return {id(p) for p in params}

    def _failed(self, seed: Seed, reason: str) -> None:
        self._link.quarantine(seed.kernel_id, reason)

    def _settled(self, seed: Seed, reason: str) -> None:
        report = field_report(self, seed, reason)
        if seed.state is SeedState.FOSSILIZED:
            # A fossil stays, so every state to go back to must have it, whatever else is
            # being blended in just now.
            self._capture()
        self._publish(report)
        self._link.report(report)

    def _publish(self, record: Contract) -> None:
        for observer in self.observers:
            observer(record)

    @property
    def catalog(self) -> Catalog:
        """The library as last seen."""
        return self._watch.current if self._watch else Catalog()

    def close(self) -> None:
        """Stop the background threads; waits for what is being written."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self._steps.close()
        self._team.close()
        self._link.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
