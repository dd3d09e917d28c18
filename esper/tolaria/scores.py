"""Where: one statistic for every site, from which it can be seen how much a seed could do there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.growth import Growth
from esper.kasmina.output import first_tensor, with_tensor
from esper.kasmina.probe import undisturbed
from esper.kasmina.slot import uncompiled
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature

log = logging.getLogger(__name__)

LossFn = Callable[[nn.Module, Any], Tensor]


FEATURES = 128
ROWS = 4096  # of a call, at most
RIDGE = 1e-2  # of the mean variance of a feature


class Statistic:
    """Sums over positions of one site, from which its score is computed.

    How much of what the loss asks for at this site could a seed give? The loss asks for a step of
    h along -g, its gradient at each position; a seed computes some f(h). Of all f that are linear
    in `FEATURES` random ReLU features of h, the one nearest to -g explains a part of it. The score
    is the share of the variance of g that it explains, between 0 and 1; what a constant explains is
    left out, for the host has biases. It has no unit: sites of unlike width, resolution, depth and
    scale compare.

    Fitting a step in function space by least squares, and judging a place by how far it gets, is
    from Verbockhaven et al., "Growing Tiny Networks" (2024), there for the part that a layer's own
    weights cannot express; choosing new weights by the gradient at birth is GradMax (Evci et al.
    2022).
    """

    def __init__(self, signature: SiteSignature) -> None:
        self._map = signature.kind is SiteKind.MAP
        self._rows = 0
        self._mean: Tensor | None = None  # of the channels in the first batch, and their deviation
        self._deviation: Tensor | None = None

    def add(self, h: Tensor, g: Tensor) -> None:
        """One call: activations, and gradients of the sum of the samples' losses by them."""
        x, y = (t.movedim(1, -1).flatten(0, -2) if self._map else t.flatten(0, -2)
                for t in (h, g))
        if len(x) > ROWS:  # drawn, for a stride might see one column of a map and no other
            drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))
            x, y = (t[drawn[:ROWS].to(t.device)] for t in (x, y))
        x, y = x.double(), y.double()  # squares of gradients are small
        if self._mean is None or self._deviation is None:
            self._mean, self._deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
            width = x.shape[1]
            generator = torch.Generator().manual_seed(width)
            weight = torch.randn(width, FEATURES, generator=generator) / width**0.5
            bias = 0.5 * torch.randn(FEATURES, generator=generator)
            self._weight, self._bias = weight.to(x), bias.to(x)
            self._sums = [x.new_zeros(FEATURES), x.new_zeros(width), x.new_zeros(width),
                          x.new_zeros(FEATURES, FEATURES), x.new_zeros(FEATURES, width)]
        features = ((x - self._mean) / self._deviation @ self._weight + self._bias).relu()
        self._rows += len(x)
        for total, part in zip(self._sums, (features.sum(0), y.sum(0), y.square().sum(0),
                                            features.T @ features, features.T @ y), strict=True):
            total += part

    def score(self) -> float:
        features, grads, variance, squares, products = (s / self._rows for s in self._sums)
        variance = variance - grads.square()
        covariance = squares - features.outer(features)
        ridge = RIDGE * covariance.diag().mean().clamp_min(1e-12)
        fitted = products - features.outer(grads)
        solved = torch.linalg.solve(
            covariance + ridge * torch.eye(FEATURES).to(covariance), fitted)
        explained, whole = float((fitted * solved).sum()), float(variance.sum())
        # A gradient that is the same everywhere varies by what rounding leaves.
        return explained / whole if whole > 1e-12 * float(grads.square().sum()) else 0.0


def statistic_flops(signature: SiteSignature, positions: int) -> int:
    """What `Statistic.add` takes for a call of so many positions, in all samples: its products of
    matrices. The one solution of a small system is not in it."""
    return 2 * min(positions, ROWS) * FEATURES * (FEATURES + 2 * signature.channels)


def site_scores(
    model: nn.Module, growth: Growth, loss_fn: LossFn, batches: Sequence[Any],
    names: Collection[str] | None = None,
) -> dict[str, float]:
    """The score of every site, or of those of `names`, from held-out batches; see `Statistic`.

    Takes one forward pass for each batch, and one backward pass for the gradients of the sites'
    outputs alone, for all sites together; and at each site 2 x 128 x (128 + 2 x channels) FLOPs for
    each position, of 4096 positions of a call at most.

    A site that no gradient reaches has no score. Nor has one that reentrant checkpointing hides,
    if the model does that in eval mode too: that is logged.
    """
    chosen = [n for n in growth.sites if names is None or n in names]
    found: dict[str, Statistic] = {}
    for batch in batches:
        for name, h, g in activations(model, growth, loss_fn, batch, chosen):
            statistic = found.setdefault(name, Statistic(growth.sites[name].found.signature))
            statistic.add(h, g * len(h))
    return {name: s.score() for name, s in found.items()}


def activations(
    model: nn.Module, growth: Growth, loss_fn: LossFn, batch: Any, names: Collection[str]
) -> list[tuple[str, Tensor, Tensor]]:
    """(site, h, dL/dh) of every call of the sites in one forward and backward pass."""
    outputs: list[tuple[str, Tensor]] = []
    hidden: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                return output
            if not torch.is_grad_enabled():
                hidden.add(name)
                return output
            if not tensor.requires_grad:  # behind frozen layers
                tensor = tensor.detach().requires_grad_()
            outputs.append((name, tensor))
            # What comes next may work in place, and the gradient would be that of its result.
            return with_tensor(output, tensor.clone())

        return hook

    handles = [growth.sites[n].found.module.register_forward_hook(watch(n)) for n in names]
    learning = [s for s in growth.active() if s.state is SeedState.TRAINING]
    try:
        for seed in learning:
            seed.forced = 0.0  # a probe is nothing to learn from
        with uncompiled(growth.compiled), undisturbed(model), torch.enable_grad():
            loss = loss_fn(model, batch)
            seen = list(outputs)  # checkpointing calls modules again in the backward
            grads = _gradients(loss, [h for _, h in seen])
        if hidden:
            log.warning("no score of %s: called without gradients, as reentrant checkpointing "
                        "does; with use_reentrant=False there is one", ", ".join(sorted(hidden)))
    finally:
        for handle in handles:
            handle.remove()
        for seed in learning:
            seed.forced = None
    return [(name, h.detach(), g) for (name, h), g in zip(seen, grads, strict=True)
            if g is not None]


def _gradients(loss: Tensor, of: list[Tensor]) -> Sequence[Tensor | None]:
    if not of:
        return []
    try:
        return torch.autograd.grad(loss, of, allow_unused=True)
    except RuntimeError as e:
        if "checkpoint" not in str(e).lower():
            raise
        log.warning("no site has a score, reentrant checkpointing does not allow it; "
                    "use_reentrant=False does: %s", e)
        return [None] * len(of)
