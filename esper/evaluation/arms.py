"""One run: one arm, one seed, from the first step to the last FLOP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from esper.data.losses import evaluate
from esper.data.splits import Batches, Task
from esper.errors import ContractError, EsperError
from esper.evaluation.experiment import GROWN, Experiment
from esper.evaluation.gromo import GromoGrower, why_not
from esper.evaluation.meter import Meter, annealed
from esper.kasmina.growth import Growth, growth_of, wrap
from esper.leyline.base import Contract
from esper.leyline.command import FieldReport, Transition
from esper.leyline.lifecycle import SeedState
from esper.tolaria.measure import SCORE_BATCHES
from esper.tolaria.scores import statistic_flops
from esper.tolaria.session import Session
from esper.urza.library import LocalLibrary

EVAL_BATCH = 512


def metric_of(task: Task, loss: float, accuracy: float | None) -> float:
    """What an arm is judged by: accuracy; bits per character of a text; the loss."""
    if task == "classification":
        assert accuracy is not None
        return accuracy
    return loss / math.log(2) if task == "language" else loss


METRICS: dict[Task, tuple[str, bool]] = {
    "classification": ("accuracy", True), "language": ("bits per character", False),
    "regression": ("squared error", False),
}
"""Name of the metric, and whether more of it is better."""


@dataclass(frozen=True)
class Row:
    """The end of an epoch, or of the run. `flops` and `seconds` are those of the whole run until
    then, `metric` and `loss` those of the eval split, where no arm's decisions look."""

    epoch: int
    step: int
    flops: int
    seconds: float
    parameters: int
    loss: float
    metric: float


@dataclass
class Log:
    """What a run leaves behind. `boundaries` are the seconds of each epoch's decisions."""

    rows: list[Row] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    boundaries: list[float] = field(default_factory=list)
    peak_parameters: int = 0


class _Run:
    def __init__(self, experiment: Experiment, model: nn.Module, budget: int, seed: int) -> None:
        self.experiment, self.model, self.budget = experiment, model, budget
        self.optimizer = experiment.optimizer(model)
        self.meter = Meter(model, experiment.loss_fn, experiment.batch)
        self.scheduler = LambdaLR(self.optimizer, annealed(self.meter, budget))
        self.batches = experiment.batches(seed)
        self.session: Session | None = None
        self.log = Log()
        self.epoch = self.step = 0
        # Called at the end of every epoch that is not the last.
        self.at_boundary: Callable[[], None] = lambda: None

    def go(self) -> Log:
        """Train until the budget is spent."""
        self._note()
        self.meter.start()
        while self._train_epoch():
            before = self.meter.seconds
            self.at_boundary()
            self.log.boundaries.append(self.meter.seconds - before)
            self._note()
        self._note()
        return self.log

    def _train_epoch(self) -> bool:
        """False where the budget ended within it, or with it."""
        self.model.train()
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.meter.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            if self.session is not None:
                self.session.step(loss)
            if self.meter.spent >= self.budget:
                return False
        self.epoch += 1
        return True

    def _note(self) -> None:
        with self.meter.unseen():
            data = self.experiment.data
            loss, accuracy = evaluate(self.model, Batches(data.eval, EVAL_BATCH), data.task)
            self.log.rows.append(Row(
                self.epoch, self.step, self.meter.spent, self.meter.seconds, self.parameters(),
                loss, metric_of(data.task, loss, accuracy)))

    def parameters(self) -> int:
        now = sum(p.numel() for p in self.model.parameters())
        self.log.peak_parameters = max(self.log.peak_parameters, now)
        return now

    def event(self, **what: Any) -> None:
        self.parameters()
        self.log.events.append(
            {"epoch": self.epoch, "step": self.step, "flops": self.meter.spent, **what})


def train(
    experiment: Experiment, arm: str, seed: int, library: Path | None = None
) -> dict[str, Any]:
    """Train one arm; returns what is written down of it, in plain values.

    `library` is a folder of proven kernels for the arms that need them. It is written to: give
    each run a copy of its own.

    Raises:
        EsperError: it could not be trained to its end; says why.
    """
    budget = experiment.budget(arm)
    model = experiment.big(seed) if arm.startswith("big") else experiment.fresh_host(seed)
    run = _Run(experiment, model, budget, seed)
    if arm in GROWN:
        if library is None:
            raise ContractError(f"arm {arm!r} needs a library of kernels")
        log = _train_grown(run, arm, seed, library)
    else:
        if arm == "fixed":
            _grow_by_schedule(run)
        elif arm == "gromo":
            _grow_by_gromo(run, seed)
        log = run.go()
    last = log.rows[-1]
    if not math.isfinite(last.loss):
        raise EsperError(f"it diverged: the loss is {last.loss} after epoch {last.epoch}")
    return {
        "budget": budget, "rows": [_plain(r) for r in log.rows], "events": log.events,
        "boundary_seconds": log.boundaries, "flops": dict(run.meter.by),
        "peak_parameters": log.peak_parameters,
    }


def _plain(row: Row) -> dict[str, Any]:
    """A figure that is not finite is none."""
    return {k: v if math.isfinite(v) else None for k, v in asdict(row).items()}


def _grow_by_schedule(run: _Run) -> None:
    grower = run.experiment.grower(run.model, run.optimizer)

    def boundary() -> None:
        if grower.end_of_epoch(run.epoch):
            run.meter.grown(run.model)
            run.event(what="block", site=grower.due[run.epoch])

    run.at_boundary = boundary


def _grow_by_gromo(run: _Run, seed: int) -> None:
    if reason := why_not():
        raise ContractError(f"arm 'gromo': {reason}")
    made = run.experiment
    sizes = {site: sum(p.numel() for p in made.make_block(site).parameters())
             for site in made.signatures}
    grower = GromoGrower(
        run.model, run.optimizer, made.grower(run.model, run.optimizer).due, made.signatures, sizes,
        # In an order of their own: those that are trained on stay what they are in other arms.
        made.batches(seed + 1_000_000), made.loss_fn, run.meter)

    def boundary() -> None:
        if neurons := grower.end_of_epoch(run.epoch):
            run.meter.grown(run.model)
            run.event(what="neurons", site=grower.due[run.epoch], neurons=neurons)

    run.at_boundary = boundary


def _train_grown(run: _Run, arm: str, seed: int, folder: Path) -> Log:
    experiment = run.experiment
    wrap(run.model, list(experiment.signatures), example=experiment.data.example,
         causal=experiment.causal)
    growth = growth_of(run.model)
    how = experiment.growing
    growth.schedule, growth.graft_steps = how.schedule, how.graft_steps
    growth.embargo_epochs, growth.seed = how.embargo_epochs, seed
    policy = (experiment.random if arm == "random" else experiment.policy)(seed)

    def observe(record: Contract) -> None:
        if isinstance(record, Transition):
            _moved(run, growth, record)
        elif isinstance(record, FieldReport):
            run.event(what="report", site=record.site, kernel=record.kernel_id,
                      outcome=str(record.outcome), gain=record.gain, reason=record.reason)

    holdout = list(Batches(experiment.data.holdout, EVAL_BATCH))
    with Session(
        run.model, run.optimizer, loss_fn=run.meter.loss, holdout=holdout,
        library=LocalLibrary(folder), policy=policy, scheduler=run.scheduler,
        lr_scale=how.lr_scale, warm_up=how.warm_up, reproducible=True, observers=[observe],
    ) as session:
        session.planned_epochs = experiment.epochs

        def boundary() -> None:
            with run.meter.charging("statistics"):
                summary = session.epoch()
            for site in summary.sites:
                if site.score is not None and site.positions is not None:
                    run.meter.charge(sum(
                        statistic_flops(site.signature, positions * len(batch[0]))
                        for batch in holdout[:SCORE_BATCHES] for positions in site.positions
                    ), "statistics")

        run.session, run.at_boundary = session, boundary
        return run.go()


def _moved(run: _Run, growth: Growth, moved: Transition) -> None:
    seed = growth.sites[moved.site].seed
    name = ""
    if moved.after is SeedState.TRAINING and seed is not None and seed.kernel is not None:
        run.meter.watch(seed)
        name = seed.kernel.ir.name
    run.event(what="transition", site=moved.site, kernel=moved.kernel_id, seed=moved.trace_id,
              before=str(moved.before), after=str(moved.after), trigger=moved.trigger,
              blueprint=name)
