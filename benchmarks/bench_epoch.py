"""What an epoch boundary costs: the decision, and a rollback where one is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.karn.templates import templates_for
from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Toolchain, kernel_id
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SiteStatus, SystemState

SITES, KERNELS = 12, 500
SIGNATURE = SiteSignature(kind=SiteKind.MAP, channels=64)


def catalog() -> Catalog:
    """A library that has been at work for long: many kernels of every template."""
    templates = list(templates_for(SIGNATURE))
    kernels = []
    for number in range(KERNELS):
        ir = templates[number % len(templates)]
        tools = Toolchain(torch="2", isa="AVX2", compiler=f"{number}", esper="0")
        identity = kernel_id(ir.id, SIGNATURE, tools, Pipeline.FAST)
        parameters = infer(ir, SIGNATURE).parameters
        manifest = Manifest(
            kernel_id=identity, blueprint_id=ir.id, signature=SIGNATURE, pipeline=Pipeline.FAST,
            toolchain=tools, backward_inputs=(), gradients=(), sha256={}, compile_seconds=0,
            flops=0,
            parameters=tuple(ParameterSpec(name=p.name, shape=p.shape) for p in parameters),
        )
        kernels.append(KernelRecord(
            kernel_id=identity, blueprint_id=ir.id, manifest=manifest, digest="0" * 64, size=1,
            status=KernelStatus.VALIDATED, created=0, updated=0))
    return Catalog(tuple(kernels))


def test_decision(benchmark: Any) -> None:
    """State to command, at its dearest: a germination is due and every kernel is looked at."""
    sites = tuple(
        SiteStatus(f"s{i}", SIGNATURE, SeedState.DORMANT, score=float(i)) for i in range(SITES))
    losses = tuple(1 / (1 + i) for i in range(200))
    state, known = SystemState(200, losses, losses, sites, 0, 0), catalog()
    benchmark.extra_info.update(target="<= 18 ms", sites=SITES, kernels=KERNELS)
    decision = benchmark.pedantic(
        lambda policy: policy.decide(state, known),
        setup=lambda: ((HeuristicPolicy(),), {}), rounds=200,
    )
    assert [c.action for c in decision.commands] == ["germinate"]


def test_rollback(benchmark: Any) -> None:
    """Ten million parameters with Adam's two moments each, put back to the last snapshot."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)], nn.Linear(1024, 10))
    esper.wrap(model, sites=["3"], example=torch.randn(2, 1024))
    optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(8, 1024), torch.randint(0, 10, (8,))

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    session = esper.Session(model, optimizer, loss_fn=loss_fn, holdout=[batch], max_rollbacks=1000)
    loss_fn(model, batch).backward()
    optimizer.step()
    session.epoch()
    bad = torch.tensor(float("nan"))
    benchmark.extra_info.update(
        target="<= 500 ms", parameters=sum(p.numel() for p in model.parameters()))
    went_on = benchmark.pedantic(session.step, args=(bad,), rounds=30, warmup_rounds=2)
    assert not went_on
    session.close()
