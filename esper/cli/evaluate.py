"""`esper evaluate`: what growth buys, beside everything that could explain it away.

Runs are processes, each writes one file, and what is there already is not run again: so an
evaluation goes on where it was interrupted, however that happened.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.cli import evaluate_config
from esper.cli.evaluate_config import EvaluateConfig, experiment_of, identity, recipe_of
from esper.cli.live import clock
from esper.errors import ConfigError
from esper.evaluation import gromo
from esper.evaluation.arms import METRICS
from esper.evaluation.experiment import ARMS, GROWN, Experiment
from esper.evaluation.kernels import look, prepare
from esper.evaluation.pool import Job, run_all
from esper.evaluation.store import Store, write_json
from esper.evaluation.summary import Subject, summarise
from esper.nissa.evaluation_page import write_evaluation_page
from esper.urza.library import LocalLibrary

TUNING = "-tuning"


@dataclass(frozen=True)
class Evaluation:
    """One configuration file: what is run, and where its results are."""

    path: Path
    config: EvaluateConfig
    experiment: Experiment
    store: Store
    libraries: Path
    arms: tuple[str, ...]
    tuning: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.tuning_seeds if self.tuning else self.config.seeds

    @cached_property
    def budgets(self) -> Mapping[str, int]:
        return {arm: self.experiment.budget(arm) for arm in self.arms}

    @cached_property
    def library(self) -> Path:
        return self.libraries / recipe_of(self.config, self.experiment).id

    def identity(self, arm: str) -> Mapping[str, Any]:
        return identity(self.config, self.path, arm, self.budgets[arm])

    def to_do(self) -> list[tuple[str, int]]:
        """Seed by seed, so that what is there early is of all arms."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms
                if not self.store.done(arm, seed, self.identity(arm))]

    def job(self, arm: str, seed: int) -> Job[Key]:
        command = [sys.executable, "-m", "esper.cli.evaluate_run", str(self.path), arm, str(seed),
                   "--folder", str(self.store.folder), "--parent", str(os.getpid()),
                   "--identity", json.dumps(self.identity(arm))]
        if arm in GROWN:
            command += ["--kernels", str(self.library)]
        log = self.store.folder / "logs" / f"{arm}-{seed}.log"
        return Job((self, arm, seed), command, log)

    def report(self) -> tuple[Path, dict[str, Any]]:
        """Write results.json and report.html from the runs that are there."""
        runs = {
            arm: {s: r for s in self.seeds if (r := self.store.read(arm, s)) is not None}
            for arm in self.arms
        }
        metric, higher = METRICS[self.experiment.data.task]
        kernels = None
        if any(arm in GROWN for arm in self.arms) and self.library.exists():
            kernels = {"id": self.library.name, **look(LocalLibrary(self.library)).as_json()}
        figures = summarise(Subject(
            name=self.config.name, data=self.experiment.data.name, metric=metric,
            higher_is_better=higher, budget=self.experiment.budget("longer"), seeds=self.seeds,
            tuning=self.tuning, target=self.config.target,
            config=self.config.model_dump(mode="json"), kernels=kernels,
            not_run={arm: why for arm in ARMS if (why := self._why_not(arm))},
        ), runs)
        write_json(self.store.folder / "results.json", figures)
        return write_evaluation_page(self.store.folder / "report.html", figures, runs), figures

    def _why_not(self, arm: str) -> str:
        if arm in self.arms:
            return ""
        return (arm == "gromo" and gromo.why_not()) or "left out of this tuning"


Key = tuple[Evaluation, str, int]


def run(
    paths: Sequence[Path], *, out: Path, tuning: bool, jobs: int | None,
    arms: Sequence[str] | None = None,
) -> int:
    """Bring every evaluation to its end and write its page; returns 1 where a run failed, else 0.

    Raises:
        EsperError: a configuration cannot be used, or the results that are there are of another
            one.
    """
    torch.set_num_threads(1)
    every = tuple(a for a in ARMS if a != "gromo" or not gromo.why_not())
    if arms and (unknown := set(arms) - set(every)):
        raise ConfigError(f"--arms: there is no {', '.join(sorted(unknown))}; the arms are "
                          f"{', '.join(every)}")
    evaluations: list[Evaluation] = []
    for path in paths:
        config = evaluate_config.load(path)
        folder = out / f"{config.name}{TUNING if tuning else ''}"
        if any(e.store.folder == folder for e in evaluations):
            raise ConfigError(f"{path}: another file is called {config.name!r} too; names are "
                              "those of results' folders")
        evaluations.append(Evaluation(
            path, config, experiment_of(config, path), Store(folder), out / "libraries",
            tuple(a for a in every if a in arms) if arms else every, tuning))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    to_do = [(e, arm, seed) for e in evaluations for arm, seed in e.to_do()]
    for e in evaluations:
        if any(x is e and arm in GROWN for x, arm, _ in to_do):
            _say(console, f"{e.config.name}: kernels are compiled and proved, once")
            prepare(recipe_of(e.config, e.experiment), e.library,
                    partial(_say, console, before=f"{e.config.name}: "))
    if to_do:
        _run_all(console, to_do, jobs or os.cpu_count() or 1)
    failed = False
    for e in evaluations:
        page, figures = e.report()
        console.print(_table(figures))
        for arm in figures["arms"]:
            failed |= bool(arm["failures"])
            for seed, why in arm["failures"].items():
                _say(console, f"{e.config.name} {arm['arm']} seed {seed} failed: "
                     f"{why.strip().splitlines()[-1]}")
        _say(console, f"report: {page}   figures: {page.with_name('results.json')}")
    return int(failed)


def _say(console: Console, text: str, before: str = "") -> None:
    console.print(before + text, markup=False, highlight=False, soft_wrap=True)


def _run_all(console: Console, to_do: Sequence[Key], at_once: int) -> None:
    board = _Board(console, len(to_do))

    def ended(key: Key, code: int) -> None:
        evaluation, arm, seed = key
        if code:  # it did not live to say so itself
            log = evaluation.job(arm, seed).log.read_text(errors="replace").strip()
            last = log.splitlines()[-1] if log else "it said nothing"
            how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
            evaluation.store.write(arm, seed, {
                "identity": evaluation.identity(arm), "failure": f"the process {how}: {last}"})
        board.ended(key)

    with board.live or nullcontext():
        run_all([e.job(arm, seed) for e, arm, seed in to_do], at_once, started=board.started,
                ended=ended, tick=board.tick)


class _Board:
    """How far it is: redrawn in a terminal, a line a run elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._running: dict[tuple[str, str, int], float] = {}
        self._begun = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def started(self, key: Key) -> None:
        evaluation, arm, seed = key
        self._running[evaluation.config.name, arm, seed] = time.monotonic()

    def ended(self, key: Key) -> None:
        evaluation, arm, seed = key
        took = time.monotonic() - self._running.pop((evaluation.config.name, arm, seed))
        self._done += 1
        run = evaluation.store.read(arm, seed)
        assert run is not None
        if run["failure"] is None:
            how = f"{METRICS[evaluation.experiment.data.task][0]} {run['rows'][-1]['metric']:.4f}"
        else:
            how = f"FAILED: {run['failure'].strip().splitlines()[-1]}"
        line = (f"[{clock(time.monotonic() - self._begun)}] {self._done}/{self._total}  "
                f"{evaluation.config.name} {arm} seed {seed}: {how}  ({took:.0f} s)")
        _say(self.live.console if self.live else self._console, line)

    def tick(self) -> None:
        if self.live is None:
            return
        now = time.monotonic()
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(f"{self._done}/{self._total} runs",
                     ProgressBar(total=self._total, completed=self._done),
                     clock(now - self._begun))
        lines = [Text(f"{name} {arm} seed {seed}  {clock(now - since)}", style="dim")
                 for (name, arm, seed), since in self._running.items()]
        self.live.update(Group(head, *lines))


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table(title=f"{figures['name']}: {figures['metric']} at the end, mean over "
                  f"{len(figures['seeds'])} seeds", title_justify="left", box=None, pad_edge=False,
                  header_style="dim", title_style="bold")
    for heading in ("arm", "runs", "mean", "95 % interval", "esper minus it", "95 % interval",
                    "GFLOP", "seconds", "parameters"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm in figures["arms"]:
        if arm["not_run"]:
            table.add_row(arm["arm"], "-", f"not run: {arm['not_run']}")
            continue
        final, less = arm["final"]["mean"], arm["esper_minus"]
        table.add_row(
            arm["arm"], str(arm["runs"]), _number(final["value"]), _between(final),
            _number(less["value"], "+") if less else "", _between(less, "+") if less else "",
            *(f"{arm[k]['median'] / scale:,.{digits}f}" if arm[k] else "-" for k, scale, digits in
              (("flops", 1e9, 1), ("seconds", 1, 1), ("parameters", 1, 0))))
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _between(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return "-"
    return f"{_number(estimate['low'], sign)} to {_number(estimate['high'], sign)}"
