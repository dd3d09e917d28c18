"""`esper train`: a configuration becomes a run, its control, and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper
from esper.cli.config import LibraryConfig, RunConfig
from esper.cli.factory import build_model, build_optimizer
from esper.cli.live import LiveView, SiteLine, Snapshot
from esper.cli.policies import make_policy
from esper.data.losses import evaluate, loss_of
from esper.data.sets import load_data
from esper.data.splits import Batches, DataSet
from esper.errors import CheckpointError, CompileError, ConfigError, LibraryError
from esper.kasmina.growth import Growth, growth_of, wrap
from esper.leyline.base import Contract, differing, flat
from esper.leyline.command import Command, Transition
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import Library
from esper.leyline.lifecycle import SeedState
from esper.leyline.verdict import Hardware
from esper.nissa.metrics import (
    Arm,
    BudgetRow,
    EpochRow,
    RunInfo,
    RunLog,
    RunSummary,
    fresh_folder,
    read_info,
)
from esper.nissa.report import headline, write_report
from esper.oona.bus import Bus
from esper.oona.capacity import CapacityWatch
from esper.rpc.address import open_library
from esper.slowtrack import SlowTrack
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tezzeret.toolchain import toolchain
from esper.tolaria.checkpoint import check, checkpoints_in
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.measure import host_flops, seed_flops
from esper.tolaria.session import EpochSummary, Session
from esper.tolaria.trainer import Trainer

EVAL_BATCH = 512
CHECKPOINTS = "checkpoints"  # below the run's folder


def _policy(
    config: RunConfig, library: Library, resumed: Path | None, view: LiveView
) -> HeuristicPolicy:
    """The policy of a run, and, told to the user, who chooses where that is not a matter of
    course. `resumed` is the folder of the run that goes on."""
    if config.growth.policy.kind != "bandit":
        return make_policy(config)
    from esper.cli.bandit import bandit_of

    before = None if resumed is None else read_info(resumed).versions.get("policy")
    chooser, said = bandit_of(library, config.seed, before)
    view.say(said)
    return make_policy(config, chooser)


def _hardware() -> Hardware:
    from esper.urabrask.machine import hardware

    return hardware()


@dataclass
class _Recorder:
    """Turns epoch summaries into rows, the live view and the decisions shown in it."""

    config: RunConfig
    label: str
    model: nn.Module
    data: DataSet
    host_flops: int | None
    view: LiveView
    run_log: RunLog | None = None
    growth: Growth | None = None
    session: Session | None = None
    rows: list[EpochRow] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def observe(self, record: Contract) -> None:
        """An observer of the session: remembers what a person would want to read."""
        if isinstance(record, Command):
            self.decisions.append(f"{record.action} {record.site}: {record.reason}")
        elif isinstance(record, Transition) and record.after is SeedState.CULLED:
            self.decisions.append(f"culled {record.site}: {record.trigger}")
        elif isinstance(record, Event) and (warning := record.body.get("warning")):
            self.decisions.append(str(warning))
        elif isinstance(record, Event) and (put_off := record.body.get("put_off")):
            line = f"put off: {put_off}"
            if line not in self.decisions[-1:]:  # said once, not every epoch
                self.decisions.append(line)

    def go_on(self, rows: Sequence[EpochRow]) -> None:
        """The run was interrupted after these."""
        self.rows = list(rows)
        self.started = time.monotonic() - (rows[-1].seconds if rows else 0.0)

    def _flops(self) -> int | None:
        total = self.host_flops
        if self.growth is not None:
            # In TRAINING a kernel runs too; what runs is what is counted.
            for seed in self.growth.fossils() + self.growth.active():
                flops = seed_flops(seed) if seed.kernel is not None else 0
                total = None if total is None or flops is None else total + flops
        return total

    def _sites(self, summary: EpochSummary | None) -> tuple[SiteLine, ...]:
        if self.growth is None or summary is None:
            return ()
        gains = {s.name: s.gain for s in summary.sites}
        return tuple(
            SiteLine(site.name, site.state, site.seed.alpha if site.seed else None,
                     site.seed.kernel_id if site.seed else None, len(site.fossils),
                     gains.get(site.name))
            for site in self.growth.sites.values()
        )

    def epoch(self, epoch: int, summary: EpochSummary | None, train_loss: float) -> None:
        eval_loss, accuracy = evaluate(self.model, Batches(self.data.eval, EVAL_BATCH),
                                       self.data.task)
        # As last polled: a library on a network must not be waited for here.
        catalog = self.session.catalog if self.session is not None else None
        depths = catalog.depths if catalog is not None else None
        steps = len(Batches(self.data.train, self.config.data.batch_size)) * epoch
        budgets = summary.decision.budgets if summary is not None else ()
        row = EpochRow(
            epoch=epoch, step=steps, train_loss=train_loss if train_loss == train_loss else None,
            eval_loss=eval_loss, eval_accuracy=accuracy,
            parameters=sum(p.numel() for p in self.model.parameters()),
            flops_per_sample=self._flops(), seconds=time.monotonic() - self.started,
            active_sites=tuple(s.name for s in self.growth.sites.values() if s.seed is not None)
            if self.growth else (),
            depths=depths, capacity=catalog.capacity if catalog is not None else None,
            budgets=tuple(BudgetRow(**vars(b)) for b in budgets),
        )
        self.rows.append(row)
        if self.run_log is not None:
            self.run_log.epoch(row)
        self.view.show(Snapshot(
            title=f"{self.config.name}: {self.label}", epoch=epoch,
            epochs=self.config.train.epochs, step=row.step, train_loss=row.train_loss,
            eval_loss=eval_loss, eval_accuracy=accuracy, parameters=row.parameters,
            sites=self._sites(summary), depths=depths, capacity=row.capacity,
            decisions=tuple(self.decisions[-6:]), elapsed=row.seconds,
            budgets=tuple((b.name, b.of) for b in row.budgets),
        ))


def _fresh_model(config: RunConfig, config_path: Path) -> nn.Module:
    """The host, with the same weights and the same random state after it every time."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config_path)
    torch.manual_seed(config.seed + 1)
    return model


class _Services:
    """The slow track of a run, looked after at epoch boundaries."""

    def __init__(self, track: SlowTrack) -> None:
        self._track = track
        self._said = False

    def warning(self) -> Event | None:
        """What to say, once, when it has ended; the training goes on with the kernels there are."""
        if self._said or self._track.alive():
            return None
        self._said = True
        return Event(topic=Topic.CAPACITY, sender="slowtrack", priority=Priority.STRATEGIC, body={
            "warning": "the slow track has ended: this run compiles and proves no more kernels; "
                       f"{self._track.log_file} may say why"})


def _wait_for_a_kernel(
    session: Session, seconds: float, view: LiveView, log_file: Path, place: LibraryConfig
) -> None:
    """Give a new library the time to prove its first kernel; an old one is ready at once."""
    if not seconds or session.catalog.kernels:
        return
    outlook = f"no kernel is ready after {seconds:.0f} s; what the services do is in {log_file}"
    try:
        if place.urza is None:
            toolchain()
        else:  # kernels are compiled wherever its workers are
            outlook = (f"no kernel is ready after {seconds:.0f} s; what works for the library: "
                       f"esper status --urza {place.urza}")
        view.say(f"waiting for a first kernel to be proved, at most {seconds:.0f} s")
    except CompileError as e:
        outlook = f"no kernel is there for this model, and none can be compiled here: {e}"
        seconds = min(seconds, 3.0)  # for the first look at the library
    end = time.monotonic() + seconds
    while not session.catalog.kernels and time.monotonic() < end:
        time.sleep(0.2)
    if not session.catalog.kernels:
        view.say(outlook)


def _train_grown(
    config: RunConfig, config_path: Path, data: DataSet, info: RunInfo, run_log: RunLog,
    view: LiveView, resumed: Path | None,
) -> _Recorder:
    model = _fresh_model(config, config_path)
    optimizer = build_optimizer(model, config.train.optimizer)
    wrap(model, config.growth.sites, example=data.example, causal=config.growth.causal)
    growth = growth_of(model)
    growth.schedule, growth.graft_steps = config.growth.alpha.kind, config.growth.alpha.steps
    growth.embargo_epochs, growth.seed = config.growth.embargo_epochs, config.seed
    place = config.library
    library = open_library(place.where, token_file=place.token_file, tls_ca=place.tls_ca)
    policy = _policy(config, library, run_log.folder if resumed is not None else None, view)
    if resumed is None:
        run_log.begin(info.model_copy(update={
            "sites": tuple(growth.sites), "versions": {**info.versions, "policy": policy.version}}))
    with ExitStack() as stack:
        services_log = run_log.folder / "slowtrack.log"
        services: _Services | None = None
        if config.slow_track.enabled:
            services = _Services(stack.enter_context(SlowTrack(
                place.where, tezzeret=config.slow_track.workers, seed=config.seed,
                priority=config.slow_track.priority, pipeline=config.slow_track.pipeline,
                log_file=services_log, token_file=place.token_file, tls_ca=place.tls_ca)))
        bus = Bus()
        stack.callback(bus.close)
        bus.subscribe(None, run_log.observe)
        stack.enter_context(CapacityWatch(library.depths, bus.publish))

        def observe(record: Contract) -> None:
            # Events may wait for the bus's thread; what the audit trail is for is written now.
            if isinstance(record, Event):
                bus.publish(record)
            else:
                run_log.observe(record)

        recorder = _Recorder(config, "growing", model, data, host_flops(model, data.example),
                             view, run_log, growth)
        options: dict[str, Any] = {
            "loss_fn": loss_of(data.task)[1], "holdout": list(Batches(data.holdout, EVAL_BATCH)),
            "library": library, "run_id": info.run_id, "policy": policy,
            "lr_scale": config.growth.lr_scale,
            "warm_up": config.growth.warm_up, "reproducible": config.growth.reproducible,
            "checkpoints": Checkpoints(run_log.folder / CHECKPOINTS,
                                       **config.checkpoint.model_dump()),
            "observers": [observe, recorder.observe],
        }
        if resumed is None:
            session = stack.enter_context(Session(model, optimizer, **options))
            recorder.session = session
            _wait_for_a_kernel(session, config.slow_track.wait_seconds, view, services_log, place)
            recorder.started = time.monotonic()
        else:
            session = stack.enter_context(Session.resume(resumed, model, optimizer, **options))
            recorder.session = session
            recorder.go_on(run_log.undo_after(session.growth.epoch, check(resumed).time))
            view.say(f"goes on after step {session.growth.step}, epoch {session.growth.epoch}")
        batches = Batches(data.train, config.data.batch_size, seed=config.seed)
        trainer = Trainer(model, optimizer, options["loss_fn"], batches, session)

        def epoch(number: int, summary: EpochSummary | None, train_loss: float) -> None:
            if services is not None and (warning := services.warning()) is not None:
                for observer in session.observers:
                    observer(warning)
            recorder.epoch(number, summary, train_loss)

        trainer.fit(config.train.epochs, epoch)
        session.end_of_epoch(last=True)  # a run that is over is not trained again
        run_log.steps(trainer.step_seconds, session.growth_steps)
        signatures = {s.found.signature for s in growth.sites.values()}
        try:
            kernels = [k for s in signatures for k in library.kernels(signature=s)]
            blueprints = [b for s in signatures for b in library.blueprints(s)]
        except LibraryError as e:  # the run is done, and its report does not hang on this
            view.say(f"the report shows the kernels last seen, and no blueprints: {e}")
            kernels, blueprints = list(session.catalog.kernels), []
        run_log.kernels(kernels, blueprints)
    return recorder


def _train_control(
    config: RunConfig, config_path: Path, data: DataSet, view: LiveView
) -> _Recorder:
    """The same host, weights, batches and epochs, never wrapped."""
    model = _fresh_model(config, config_path)
    optimizer = build_optimizer(model, config.train.optimizer)
    recorder = _Recorder(config, "the same host without growth", model, data,
                         host_flops(model, data.example), view)
    batches = Batches(data.train, config.data.batch_size, seed=config.seed)
    Trainer(model, optimizer, loss_of(data.task)[1], batches).fit(config.train.epochs,
                                                                  recorder.epoch)
    return recorder


_COURSE = ("seed", "model", "data", "train", "growth")


def _to_resume(config: RunConfig, run: Path) -> tuple[Path, Path]:
    """(folder of the run, its checkpoint) that `run` names, if it was a run of `config`."""
    folder = run if (run / "run.json").exists() else run.parent.parent
    before = read_info(folder).config
    now = config.model_dump(mode="json")
    # What decides the course of the run; how long it lasts and where it is kept may change.
    old, new = (
        {k: v for k, v in flat(config).items()
         if k.partition(".")[0] in _COURSE and k != "train.epochs"} for config in (before, now))
    if odd := differing(old, new):
        shown = ", ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in odd)
        raise ConfigError(f"{folder} is a run of another configuration: {shown}; give the file as "
                          "it was, or start a new run")
    if run != folder:
        return folder, run
    kept = checkpoints_in(folder / CHECKPOINTS)
    if not kept:
        raise CheckpointError(f"{folder / CHECKPOINTS} has no checkpoint to resume from; start the "
                              "run again")
    return folder, kept[-1]


def run(config: RunConfig, config_path: Path, resume: Path | None = None) -> int:
    """Carry out one configuration, or go on with the run `resume` of it; returns the exit code.

    Raises:
        EsperError: the configuration, its data, its model or its checkpoint cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config.data, config_path)
    if resume is None:
        folder, resumed = fresh_folder(config.folder), None
    else:
        folder, resumed = _to_resume(config, resume)
    started = time.monotonic()
    with RunLog(folder, going_on=resumed is not None) as run_log, LiveView() as view:
        info = RunInfo(
            name=config.name, seed=config.seed, config=config.model_dump(mode="json"),
            versions={"esper": esper.__version__, "torch": str(torch.__version__),
                      "numpy": version("numpy")},
            hardware=_hardware(), metric=loss_of(data.task)[0], samples_per_epoch=len(data.train),
            primary="accuracy" if data.task == "classification" else "loss",
            eval_samples=data.eval.targets.numel())
        control, reason = None, "compare is off in the configuration"
        if config.growth.enabled:
            grown = _train_grown(config, config_path, data, info, run_log, view, resumed)
            if config.compare:
                control = _train_control(config, config_path, data, view)
        else:
            if resumed is not None:
                raise ConfigError("growth is off, and only a growing run is saved; start it again")
            run_log.begin(info)
            grown, reason = _train_control(config, config_path, data, view), "growth is off"
        run_log.finish(RunSummary(
            grown=Arm(label=grown.label, epochs=tuple(grown.rows)),
            control=Arm(label=control.label, epochs=tuple(control.rows)) if control else None,
            no_control="" if control else reason, seconds=time.monotonic() - started))
    report = write_report(folder)
    view.say(headline(folder))
    view.say(f"report: {report}")
    return 0
