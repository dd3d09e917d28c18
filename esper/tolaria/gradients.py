"""Gradients of seeds, averaged over the ranks as those of the host are.

DistributedDataParallel reduces the parameters that a model had when it was made, `fully_shard`
those that it sharded. Seeds come later. In TRAINING, and in compiled hosts, their gradients do not
even pass through a node that a reducer could wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from esper.kasmina.output import parts_of
from esper.tolaria.ranks import Ranks


class SeedGradients:
    """Averages the `.grad` of seeds at the end of every backward of a parallel model: one
    all-reduce for all seeds, none while there are none.

    At the end of the backward, so that clipping, a GradScaler and whatever else looks at gradients
    before the optimizer sees what all ranks see; and not by a hook on the parameters, for a seed
    that is not reached on one rank must not keep the others waiting. A backward under DDP's
    `no_sync` is left out. What adds up over several backwards may be averaged at each of them: what
    was averaged before is equal on all ranks, and stays so.

    `seeds` gives the parameters of this moment, in an order that all ranks share. While `paused`
    nothing is done: gradients are asked for that no optimizer will see.
    """

    def __init__(
        self, model: nn.Module, seeds: Callable[[], Sequence[nn.Parameter]], ranks: Ranks
    ) -> None:
        self.paused = False
        self._seeds, self._ranks = seeds, ranks
        self._queued = False
        self._flat = torch.empty(0)
        self._views: list[Tensor] = []
        self._kinds: list[Any] = []  # shape and type of each parameter that the views are for
        self._handle: Any = model.register_forward_hook(self._forward)

    def close(self) -> None:
        self._handle.remove()

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._queued = False
        wanted = torch.is_grad_enabled() and getattr(module, "require_backward_grad_sync", True)
        if wanted and not self.paused and self._seeds():
            self._watch(output)

    def _watch(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            for _, part in parts_of(output):
                self._watch(part)
        elif output.requires_grad:
            output.register_hook(self._begun)

    def _begun(self, gradient: Tensor) -> None:
        if not self._queued:
            self._queued = True
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._ended)

    def _ended(self) -> None:
        self._queued = False
        params = [p for p in self._seeds() if p.requires_grad]
        if not params:
            return
        for p in params:
            if p.grad is None:  # not reached here; another rank may have
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        views = self._views_for(params)
        with torch.no_grad():
            torch._foreach_copy_(views, grads)
            self._ranks.average(self._flat)
            torch._foreach_copy_(grads, views)

    def _views_for(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Places in one flat tensor, which is kept from step to step."""
        kinds = [(p.shape, p.dtype) for p in params]
        if kinds != self._kinds:
            self._kinds = kinds
            dtype = reduce(torch.promote_types, (p.dtype for p in params))
            sizes = [p.numel() for p in params]
            self._flat = torch.empty(sum(sizes), dtype=dtype, device=params[0].device)
            self._views = [part.view(p.shape) for part, p in
                           zip(self._flat.split(sizes), params, strict=True)]
        return self._views
