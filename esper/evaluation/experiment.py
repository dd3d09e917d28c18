"""What all arms of an experiment share, and how much they may spend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.optim import Optimizer

from esper.data.losses import Loss, loss_of
from esper.data.splits import Batch, Batches, DataSet
from esper.evaluation.fixed import FixedGrower, put_behind
from esper.evaluation.flops import Cost, cost_of
from esper.kasmina.sites import find_sites
from esper.leyline.signature import SiteSignature
from esper.tamiyo.state import Policy

# In the order in which they are shown. The first five are plain torch.
ARMS: Mapping[str, str] = {
    "host": "host alone, nominal epochs",
    "longer": "host alone, until the FLOPs are spent",
    "big": "big model from scratch, nominal epochs",
    "big_matched": "big model from scratch, until the FLOPs are spent",
    "fixed": "fixed-schedule grower in plain torch",
    "random": "esper with random place, time and kernel",
    "esper": "esper",
    "gromo": "GroMo's new neurons, where and when the fixed grower adds blocks",
}
GROWN = ("random", "esper")  # arms that need kernels


@dataclass(frozen=True)
class Growing:
    """How seeds are blended in and learn; see `kasmina.growth.Growth` and `tolaria.Session`."""

    schedule: str = "cosine"
    graft_steps: int = 100
    embargo_epochs: int = 5
    lr_scale: float = 1.0
    warm_up: int = 0


@dataclass(frozen=True)
class Experiment:
    """One task and one host.

    Args:
        epochs: of the arms that train for a nominal time.
        host: makes a fresh host; weights come from torch's random state.
        block: makes what the fixed grower puts behind a site of so many channels.
        sites: names or patterns of modules.
        blocks, first, every: the fixed grower's schedule, see `FixedGrower`.
        policy, random: make the policies of two arms, from a seed.
        flops: the budget; None is what the fixed grower spends in `epochs`.
    """

    name: str
    data: DataSet
    batch_size: int
    epochs: int
    host: Callable[[], nn.Module]
    block: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    sites: tuple[str, ...]
    blocks: int
    first: int
    every: int
    policy: Callable[[int], Policy]
    random: Callable[[int], Policy]
    flops: int | None = None
    causal: bool = False
    growing: Growing = field(default_factory=Growing)

    @property
    def loss_fn(self) -> Loss:
        return loss_of(self.data.task)[1]

    @property
    def batch(self) -> Batch:
        """A whole batch, to count with."""
        split = self.data.train.first(self.batch_size)
        return split.inputs, split.targets

    @cached_property
    def signatures(self) -> Mapping[str, SiteSignature]:
        """By the names of the sites.

        Raises:
            SiteError: a site does not exist, or cannot be grown.
        """
        with torch.random.fork_rng(devices=[]):
            found = find_sites(self.host(), self.sites, self.data.example, causal=self.causal)
        return {f.name: f.signature for f in found}

    def fresh_host(self, seed: int) -> nn.Module:
        """The host of this seed: the same weights in every arm."""
        torch.manual_seed(seed)
        model = self.host()
        torch.manual_seed(seed + 1)
        return model

    def make_block(self, site: str) -> nn.Module:
        return self.block(self.signatures[site].channels)

    def big(self, seed: int) -> nn.Module:
        """What the fixed grower ends with, from the start."""
        model = self.fresh_host(seed)
        names = list(self.signatures)
        for i in range(self.blocks):
            put_behind(model, names[i % len(names)], self.make_block(names[i % len(names)]))
        return model

    def grower(self, model: nn.Module, optimizer: Optimizer) -> FixedGrower:
        return FixedGrower(model, optimizer, list(self.signatures), self.make_block, self.blocks,
                           self.first, self.every)

    # -- budgets --------------------------------------------------------------------------

    def epoch_flops(self, cost: Cost) -> int:
        """What one pass over the training data costs."""
        whole, rest = divmod(len(self.data.train), self.batch_size)
        return whole * cost.of(self.batch_size, True) + (cost.of(rest, True) if rest else 0)

    def budget(self, arm: str) -> int:
        """What an arm may spend: it ends with the step that reaches this."""
        match arm:
            case "host":
                return self.epochs * self.epoch_flops(self._cost(self.fresh_host(0)))
            case "big":
                return self.epochs * self.epoch_flops(self._cost(self.big(0)))
        return self.flops if self.flops is not None else self._of_the_grower

    def _cost(self, model: nn.Module) -> Cost:
        return cost_of(model, self.loss_fn, self.batch)

    @cached_property
    def _of_the_grower(self) -> int:
        with torch.random.fork_rng(devices=[]):
            model = self.fresh_host(0)
            grower = self.grower(model, torch.optim.SGD(model.parameters(), lr=0.1))
            total, epoch_flops = 0, self.epoch_flops(self._cost(model))
            for epoch in range(1, self.epochs + 1):
                total += epoch_flops
                if grower.end_of_epoch(epoch):
                    epoch_flops = self.epoch_flops(self._cost(model))
            return total

    def batches(self, seed: int) -> Batches:
        return Batches(self.data.train, self.batch_size, seed=seed)
