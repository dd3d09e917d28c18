"""Measurements on held-out batches at epoch boundaries: losses, counterfactuals, FLOPs.

All of them run in eval mode and leave the random state, the buffers and the gradients of
the model as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.growth import Growth
from esper.kasmina.probe import batch_size, call, undisturbed
from esper.kasmina.seed import Seed
from esper.leyline.lifecycle import SeedState
from esper.leyline.shapes import flops_at
from esper.tamiyo.state import SiteStatus
from esper.tolaria.scores import LossFn, site_scores
from esper.tolaria.summary import Passes

SIGNAL_ALPHA = 0.1
SCORE_BATCHES = 4  # held-out batches that a score is taken from, at most
_MEASURED = (SeedState.TRAINING, SeedState.EVALUATING, SeedState.FINE_TUNING)


def mean_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> float:
    """Mean of the batches' losses, each batch counting the same."""
    with undisturbed(model):
        return float(torch.stack([loss_fn(model, b).detach().float() for b in batches]).mean())


def counterfactual_gain(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], seed: Seed,
    loss: float | None = None,
) -> tuple[float, float, float]:
    """(gain, loss without the seed, loss with it); gain is their difference.

    A seed that is blended in is measured as it stands. One in TRAINING is measured at alpha =
    `SIGNAL_ALPHA`: it learns from a gradient that does not yet answer to it, so it knows a
    direction and not how far to go; the step size is found when it is blended in.

    One of the two is the loss of the model as it stands. Give that as `loss`, where it was
    measured on the same batches already, and only the other one is measured.
    """
    if loss is None:
        loss = mean_loss(model, loss_fn, batches)
    learning = seed.state is SeedState.TRAINING  # and nobody sees it yet
    try:
        seed.forced = SIGNAL_ALPHA if learning else 0.0
        other = mean_loss(model, loss_fn, batches)
    finally:
        seed.forced = None
    without, with_it = (loss, other) if learning else (other, loss)
    return without - with_it, without, with_it


def survey(growth: Growth, used: Mapping[str, Iterable[str]]) -> tuple[SiteStatus, ...]:
    """Every site, without what has to be measured. `used` are the blueprints tried at each."""
    return tuple(
        SiteStatus(
            name=name, signature=site.found.signature, state=site.state,
            epochs_in_state=site.seed.epochs_in_state if site.seed else 0,
            trace_id=site.seed.trace_id if site.seed else "",
            kernel_id=site.seed.kernel_id if site.seed else None,
            fossils=len(site.fossils), used_blueprints=frozenset(used.get(name, ())),
            positions=site.found.positions)
        for name, site in growth.sites.items())


def look_at(
    model: nn.Module, growth: Growth, loss_fn: LossFn, holdout: Sequence[Any],
    sites: Sequence[SiteStatus], loss: float, evidence: dict[str, tuple[float, float, float]], *,
    wanted: Collection[str] | None, scored: bool,
) -> tuple[tuple[SiteStatus, ...], Passes]:
    """`sites` with gains and scores, and what measuring them and `loss` took.

    `loss` is the mean of `holdout`. `wanted` names the sites to measure, None is all of them;
    dormant ones get scores where `scored`. What `counterfactual_gain` said of a seed goes into
    `evidence`, by its trace id.
    """
    looked = [s for s in sites if wanted is None or s.name in wanted]
    seeds = {s.name: seed for s in looked
             if s.state in _MEASURED and (seed := growth.sites[s.name].seed) is not None}
    for seed in seeds.values():
        evidence[seed.trace_id] = counterfactual_gain(model, loss_fn, holdout, seed, loss)
    dormant = [s.name for s in looked if s.state is SeedState.DORMANT] if scored else []
    batches = holdout[:SCORE_BATCHES] if dormant else []
    scores = site_scores(model, growth, loss_fn, batches, dormant) if dormant else {}
    passes = Passes(len(holdout) * (1 + len(seeds)) + len(batches), len(batches))
    return tuple(
        replace(s, score=scores.get(s.name),
                gain=evidence[s.trace_id][0] if s.name in seeds else None)
        for s in sites), passes


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
    return flops_at(seed.kernel.ir, seed.site.signature, seed.site.positions)


def grown(seeds: Sequence[Seed]) -> dict[str, Any]:
    """What a SystemState says of all seeds there are."""
    flops = [seed_flops(s) for s in seeds if s.kernel is not None]
    return {
        "growths": len(seeds), "seeds": frozenset(s.trace_id for s in seeds),
        "grown_parameters": sum(p.numel() for s in seeds for p in s.params),
        "grown_flops": None if None in flops else sum(f for f in flops if f is not None),
    }
