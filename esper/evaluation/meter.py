"""The meter of one run: every FLOP that it spends, as it spends it, and the time that it takes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.evaluation.flops import Cost, LossFn, cost_of, seed_cost
from esper.kasmina.seed import Seed
from esper.leyline.lifecycle import SeedState

WARM_UP = 2, 4  # batch and space of the zeros that Kasmina's loader runs a new kernel on


class Meter:
    """Counts for one model, whose every call goes through `loss`.

    A call costs what the same call of a copy of the model cost under torch's counter, in
    proportion to its samples; each call of a seed's kernel is counted besides, when it happens.
    `spent` has it all, `by` splits it: "training", "statistics" (what is measured to decide:
    held-out losses, counterfactuals, site scores) and "warm-up" (the first run of a new kernel).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, batch: Sequence[Tensor]) -> None:
        self._loss_fn, self._batch = loss_fn, batch
        self.by: Counter[str] = Counter()
        self.spent = 0
        self._what = "training"
        self._off = False
        self._started: float | None = None
        self._seconds = 0.0
        self._seed_costs: dict[tuple[str, str, tuple[int, ...]], Cost] = {}
        self.host = cost_of(model, loss_fn, batch)

    # -- FLOPs ----------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of `batch`, counted; with a backward pass where gradients are on."""
        loss = self._loss_fn(model, batch)
        self._add(self.host.of(len(batch[0]), torch.is_grad_enabled()))
        return loss

    def grown(self, model: nn.Module) -> None:
        """The model itself has changed: from now on its calls cost something else."""
        with self.unseen():
            self.host = cost_of(model, self._loss_fn, self._batch)

    def watch(self, seed: Seed) -> None:
        """Count a seed whose kernel has just been taken in: its first run, and all to come."""
        assert seed.kernel is not None and seed.runner is not None
        with self.unseen():
            zeros = self._seed_cost(seed, seed.site.signature.shape(*WARM_UP))
        self._add(zeros.both, "warm-up")
        seed.runner = _Counted(seed.runner, seed, self)

    def called(self, seed: Seed, h: Tensor) -> None:
        """A seed's runner was called on `h`."""
        learning = torch.is_grad_enabled()
        if not self._off and _runs(seed, learning):
            self._add(self._seed_cost(seed, h.shape).of(h.shape[0], learning))

    def _seed_cost(self, seed: Seed, shape: Sequence[int]) -> Cost:
        assert seed.kernel is not None
        key = seed.kernel.ir.id, seed.site.signature.id, tuple(shape[1:])
        if key not in self._seed_costs:
            self._seed_costs[key] = seed_cost(seed.kernel.ir, seed.site.signature, shape)
        return self._seed_costs[key]

    def _add(self, flops: int, what: str | None = None) -> None:
        if not self._off:
            self.spent += flops
            self.by[what or self._what] += flops

    def charge(self, flops: int, what: str) -> None:
        """Enter what was spent outside of the model's calls."""
        self._add(flops, what)

    @contextmanager
    def charging(self, what: str) -> Iterator[None]:
        """What is spent inside is entered as `what`."""
        before, self._what = self._what, what
        try:
            yield
        finally:
            self._what = before

    # -- time -----------------------------------------------------------------------------

    def start(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time of the run until now, without what was `unseen`."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Neither FLOPs nor time count inside: for what measures a run and is no part of it."""
        before, self._off = self._off, True
        running = self._started is not None
        if running:
            self._seconds, self._started = self.seconds, None
        try:
            yield
        finally:
            self._off = before
            if running:
                self.start()


def annealed(meter: Meter, budget: int) -> Any:
    """For torch's LambdaLR: a cosine over the share of the budget that is spent, so that every
    arm ends with a learning rate of zero, whatever an epoch costs it."""
    return lambda _: 0.5 * (1 + math.cos(math.pi * min(1.0, meter.spent / budget)))


def _runs(seed: Seed, learning: bool) -> bool:
    """Whether its kernel is run in a call, as `Runner` says."""
    if seed.forced is not None:
        return seed.forced > 0
    return learning if seed.state is SeedState.TRAINING else seed.alpha > 0


class _Counted:
    """A seed's runner, and the meter that is told of its calls."""

    def __init__(self, runner: Any, seed: Seed, meter: Meter) -> None:
        self._runner, self._seed, self._meter = runner, seed, meter

    def __call__(self, h: Tensor) -> Tensor:
        out: Tensor = self._runner(h)
        self._meter.called(self._seed, h)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)
