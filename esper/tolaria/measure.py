"""Measurements on held-out batches at epoch boundaries: losses, counterfactuals, site scores.

All of them run in eval mode and leave the random state, the buffers and the gradients of
the model as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.growth import Growth
from esper.kasmina.output import first_tensor, with_tensor
from esper.kasmina.probe import batch_size, call, undisturbed
from esper.kasmina.seed import Seed
from esper.kasmina.slot import uncompiled
from esper.leyline.lifecycle import SeedState
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind
from esper.tamiyo.state import SiteStatus

log = logging.getLogger(__name__)

SIGNAL_ALPHA = 0.1
_MEASURED = (SeedState.TRAINING, SeedState.EVALUATING, SeedState.FINE_TUNING)
LossFn = Callable[[nn.Module, Any], Tensor]


def mean_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    """Mean of the batches' losses, each batch counting the same."""
    with undisturbed(model):
        return float(torch.stack([loss_fn(model, b).detach().float() for b in batches]).mean())


def counterfactual_gain(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: Seed
) -> tuple[float, float, float]:
    """(gain, loss without the seed, loss with it); gain is their difference.

    A seed that is blended in is measured in full. One in TRAINING is measured at alpha =
    `SIGNAL_ALPHA`: it learns from a gradient that does not yet answer to it, so it knows a
    direction and not how far to go; the step size is found when it is blended in.
    """
    try:
        seed.forced = 0.0
        without = mean_loss(model, loss_fn, batches)
        seed.forced = SIGNAL_ALPHA if seed.state is SeedState.TRAINING else 1.0
        with_it = mean_loss(model, loss_fn, batches)
    finally:
        seed.forced = None
    return without - with_it, without, with_it


def site_scores(model: nn.Module, growth: Growth, loss_fn: LossFn, batch: Any) -> dict[str, float]:
    """Gradient signal of every site: the sum over samples, and over calls, of |dL/dh| * |h|.

    That is a bound on how much a change of h of its own size could lower the loss, to first
    order; the choice of "where" by the norm of the gradient at the site follows GradMax
    (Evci et al. 2022), which maximises the gradient norm of new neurons.

    A site that no gradient reaches has no score. Nor has one that reentrant checkpointing hides,
    if the model does that in eval mode too: that is logged.
    """
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

    handles = [s.found.module.register_forward_hook(watch(n)) for n, s in growth.sites.items()]
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
    scores: dict[str, float] = {}
    for (name, h), g in zip(seen, grads, strict=True):
        if g is not None:
            sample_norm = g.flatten(1).norm(dim=1) * h.detach().flatten(1).norm(dim=1)
            scores[name] = scores.get(name, 0.0) + float(sample_norm.sum())
    return scores


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


def survey(
    model: nn.Module, growth: Growth, loss_fn: LossFn, holdout: Sequence[Any],
    used: Mapping[str, Iterable[str]], evidence: dict[str, tuple[float, float, float]], *,
    scored: bool,
) -> tuple[SiteStatus, ...]:
    """Every site as a policy sees it; dormant ones have scores where `scored`.

    `used` are the blueprints tried at each site. What `counterfactual_gain` said of a seed goes
    into `evidence`, by its trace id.
    """
    scores: dict[str, float] = {}
    if scored and any(s.state is SeedState.DORMANT for s in growth.sites.values()):
        scores = site_scores(model, growth, loss_fn, holdout[0])
    result = []
    for name, site in growth.sites.items():
        seed, gain = site.seed, None
        if seed is not None and seed.state in _MEASURED:
            evidence[seed.trace_id] = counterfactual_gain(model, loss_fn, holdout, seed)
            gain = evidence[seed.trace_id][0]
        result.append(SiteStatus(
            name=name, signature=site.found.signature, state=site.state,
            epochs_in_state=seed.epochs_in_state if seed else 0,
            trace_id=seed.trace_id if seed else "",
            kernel_id=seed.kernel_id if seed else None,
            gain=gain, score=scores.get(name), fossils=len(site.fossils),
            used_blueprints=frozenset(used.get(name, ())),
        ))
    return tuple(result)


def host_flops(model: nn.Module, example: Any) -> int | None:
    """FLOPs of one forward pass per sample, by torch's own counter; None where it sees none."""
    counter = FlopCounterMode(display=False)
    with undisturbed(model), counter:
        call(model, example)
    total, batch = counter.get_total_flops(), batch_size(example)
    return total // batch if total and batch else None


def seed_flops(seed: Seed) -> int | None:
    """FLOPs of a seed in one forward pass of its host, per sample; None without an example."""
    if seed.kernel is None or seed.site.positions is None:
        return None
    signature, total = seed.site.signature, 0
    for positions in seed.site.positions:
        space = round(positions**0.5) if signature.kind is SiteKind.MAP else positions
        total += infer(seed.kernel.ir, signature, space=max(1, space)).flops
    return total
