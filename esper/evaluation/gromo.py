"""GroMo as a peer: new neurons that are best to first order (Verbockhaven et al. 2024).

By the public classes of the package `gromo`: at the places and times of the fixed grower an empty
`GrowingBlock` is put behind the site, statistics are gathered over some batches of training data,
and the block is grown by the neurons that GroMo computes from them. So what differs from the fixed
grower is how new parameters start, and what a block is: a linear layer (on maps a 3x3 convolution),
ReLU, and another, with at most as many neurons as make it as large as the fixed grower's block.
GroMo computes no more neurons than the site has channels (times nine on maps). New ones come in at
scale 1; GroMo's own line search for the scale is not used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.data.splits import Batch
from esper.evaluation.fixed import put_behind
from esper.evaluation.flops import LossFn, counter
from esper.evaluation.meter import Meter
from esper.leyline.signature import SiteKind, SiteSignature

STATISTICS_BATCHES = 10


def why_not() -> str:
    """Why there is no such arm here, "" where there is one."""
    if importlib.util.find_spec("gromo") is None:
        return "the package gromo is not installed here"
    try:
        from gromo.containers.growing_block import LinearGrowingBlock  # noqa: F401
    except Exception as e:  # whatever an installed package does when it is imported
        return f"the package gromo cannot be imported: {type(e).__name__}: {e}"
    return ""


def gromo_version() -> str | None:
    return None if why_not() else version("gromo")


def _block(signature: SiteSignature) -> Any:
    """An empty block: its output is its input."""
    from gromo.containers.growing_block import Conv2dGrowingBlock, LinearGrowingBlock

    c = signature.channels
    common: dict[str, Any] = {"mid_activation": nn.ReLU(), "device": torch.device("cpu")}
    if signature.kind is SiteKind.MAP:
        return Conv2dGrowingBlock(
            c, c, kernel_size=3, pre_activation=nn.Identity(),
            kwargs_layer={"use_bias": True, "padding": 1}, **common)
    before = nn.LayerNorm(c) if signature.kind is SiteKind.TOKENS else nn.Identity()
    return LinearGrowingBlock(
        c, c, pre_activation=before, kwargs_layer={"use_bias": True}, **common)


class GromoGrower:
    """Grows where and when `due` says, by the epoch's number. `sizes` are the parameters of the
    fixed grower's block at each site; `batches` are for statistics."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, due: Mapping[int, str],
        signatures: Mapping[str, SiteSignature], sizes: Mapping[str, int], batches: Iterable[Batch],
        loss_fn: LossFn, meter: Meter,
    ) -> None:
        self.model, self.optimizer, self.due = model, optimizer, due
        self._signatures, self._sizes = signatures, sizes
        self._batches, self._loss_fn, self._meter = batches, loss_fn, meter

    def end_of_epoch(self, epoch: int) -> int:
        """How many neurons came in."""
        site = self.due.get(epoch)
        if site is None:
            return 0
        block = _block(self._signatures[site])
        put_behind(self.model, site, block)
        # All that torch's counter sees; it does not see decompositions of small matrices.
        with counter() as seen:
            self._gather(block)
            # Its threshold is in units of the loss's gradients, which a mean makes small: without
            # it the number of neurons decides.
            block.compute_optimal_updates(
                maximum_added_neurons=self._neurons(site, self._signatures[site]),
                statistical_threshold=0.0)
        self._meter.charge(seen.get_total_flops(), "statistics")
        block.set_scaling_factor(1.0)
        block.apply_change()
        block.delete_update()
        block.reset_computation()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.param_groups[0]["params"].extend(block.parameters())
        return int(block.hidden_neurons)

    def _gather(self, block: Any) -> None:
        block.init_computation()
        for number, batch in enumerate(self._batches):
            if number == STATISTICS_BATCHES:
                break
            self.optimizer.zero_grad(set_to_none=True)
            self._loss_fn(self.model, batch).backward()
            block.update_computation()

    def _neurons(self, site: str, signature: SiteSignature) -> int:
        """As many as make the block about as large as the fixed grower's."""
        window = 9 if signature.kind is SiteKind.MAP else 1
        return max(1, math.ceil(self._sizes[site] / (2 * window * signature.channels + 1)))

