"""What an epoch boundary costs: the decision, the copy of the run, and a rollback where one is
needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.karn.templates import templates_for
from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Toolchain, kernel_id
from esper.leyline.command import FieldReport
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tamiyo.bandit import Bandit, LinearModel
from esper.tamiyo.choice import Candidate
from esper.tamiyo.features import FEATURES, fit_columns
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import Catalog, SiteStatus, SystemState

SITES, KERNELS, REPORTS = 12, 500, 2000
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
    """State to command, at its dearest: a germination is due and every kernel is looked at, for
    every site; once to say what is to be measured, and once to choose."""
    sites = tuple(
        SiteStatus(f"s{i}", SIGNATURE, SeedState.DORMANT, score=float(i)) for i in range(SITES))
    losses = tuple(1 / (1 + i) for i in range(200))
    state, known = SystemState(200, losses, losses, sites, 0, 0), catalog()
    benchmark.extra_info.update(target="<= 18 ms", sites=SITES, kernels=KERNELS)
    decision = benchmark.pedantic(
        lambda policy: policy.wants(state, known) and policy.decide(state, known),
        setup=lambda: ((HeuristicPolicy(),), {}), rounds=200,
    )
    assert [c.action for c in decision.commands] == ["germinate"]


def test_bandit(benchmark: Any) -> None:
    """The same by the bandit: every kernel at one site, with two thousand reports known. The
    version it starts from knows nothing, which costs what knowing something does."""
    templates = templates_for(SIGNATURE)
    site = SiteStatus("s0", SIGNATURE, SeedState.DORMANT, score=1.0)
    state = SystemState(200, (1.0, 0.5), (1.0, 0.5), (site,), 0, 0)
    reports = tuple(
        FieldReport(run_id="r", trace_id="t", site="s0", kernel_id="k", reason="", epochs=3,
                    blueprint_id=templates[n % len(templates)].id, gain=0.1, loss_before=1.0,
                    outcome=SeedState.FOSSILIZED, time=0.0)
        for n in range(REPORTS))
    known = Catalog(catalog().kernels, reports)
    candidates = [Candidate(site, k, 0, None) for k in known.kernels]
    columns = fit_columns(np.random.default_rng(0).normal(size=(50, len(FEATURES))))
    bandit = Bandit(LinearModel(
        columns=columns, intercept=0.0, coefficients=(0.0,) * columns.size, noise=0.1, until=0.0,
        precision=tuple(tuple(row) for row in np.eye(columns.size).tolist())), "bench")
    benchmark.extra_info.update(target="<= 18 ms", candidates=KERNELS, reports=REPORTS)
    values = benchmark.pedantic(
        bandit.values, args=(candidates, state, known), rounds=200, warmup_rounds=2)
    assert len(values) == KERNELS


def session_of(millions: int, optimizer: str) -> tuple[esper.Session, Any]:
    """A run of so many million parameters, with an optimizer that has state for all of them."""
    torch.manual_seed(0)
    wide = 2048  # one layer has 4.2 million
    layers = [nn.Linear(wide, wide) for _ in range(round(millions * 1e6 / wide**2))]
    model = nn.Sequential(*layers, nn.Linear(wide, 10))
    esper.wrap(model, sites=["1"], example=torch.randn(2, wide))
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, lr=1e-6)}[optimizer]
    batch = torch.randn(8, wide), torch.randint(0, 10, (8,))

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    session = esper.Session(model, make(model.parameters()), loss_fn=loss_fn, holdout=[batch],
                            max_rollbacks=1000)

    def step() -> torch.Tensor:
        session.optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        session.optimizer.step()
        return loss

    session.step(step())
    session.epoch()
    return session, step


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("millions", [10, 100])
def test_rollback(benchmark: Any, millions: int, optimizer: str) -> None:
    """A step after which the loss is NaN, up to the moment at which training can go on: everything
    is copied back from the last snapshot."""
    session, step = session_of(millions, optimizer)
    bad = torch.tensor(float("nan"))
    benchmark.extra_info.update(
        target="<= 500 ms", threads=torch.get_num_threads(), optimizer=optimizer,
        parameters=sum(p.numel() for p in session.model.parameters()))
    went_on = benchmark.pedantic(
        session.step, args=(bad,), setup=lambda: step() and None, rounds=10, warmup_rounds=1)
    assert not went_on
    session.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_snapshot(benchmark: Any, optimizer: str) -> None:
    """What an epoch boundary copies, into the memory of the snapshot before."""
    session, _ = session_of(100, optimizer)
    benchmark.extra_info.update(threads=torch.get_num_threads(), optimizer=optimizer)
    benchmark.pedantic(session._capture, rounds=10, warmup_rounds=1)
    session.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_checkpoint(benchmark: Any, optimizer: str, tmp_path: Path) -> None:
    """How long the training thread is held up by a checkpoint. It is written meanwhile."""
    session, _ = session_of(100, optimizer)
    benchmark.extra_info.update(threads=torch.get_num_threads(), optimizer=optimizer)
    writing: list[Any] = []

    def settled() -> None:
        while writing:
            shutil.rmtree(writing.pop().result())

    benchmark.pedantic(
        lambda: writing.append(session.save(tmp_path / "kept")), setup=settled, rounds=3)
    settled()
    session.close()
