"""The walk, the choice and the table with plain kernels; then all of it with real ones."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.leyline.artifact import Pipeline
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.reference import apply
from esper.nn.provide import Provider
from esper.nn.trace import Match, match, tensors
from esper.nn.values import NoMatch
from esper.urabrask.bench import Comparison
from esper.urabrask.oracle import Oracle, Problem
from esper.urza.library import LocalLibrary
from tests.nn.modules import MLP, LlamaMLP, TransformerBlock
from tests.support import plain_kernel

HERE = sys.modules["esper.nn.accelerate"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """Kernels in plain torch, and measurements as given: ratio by number of operations."""
    ratios: dict[int, float] = {}
    latest: list[Match] = []

    def kernel(self: Provider, found: Match, name: str) -> tuple[Any, Any]:
        latest.append(found)
        if len(found.ir.nodes) not in ratios:
            raise NoMatch("its kernel is REJECTED: too wrong")
        record = SimpleNamespace(kernel_id=f"k-{len(found.ir.nodes)}")
        return record, plain_kernel(found.ir, found.signature)

    def compare(fast: Any, plain: Any, *, budget_seconds: float) -> Comparison:
        fast(), plain()
        ratio = ratios[len(latest[-1].ir.nodes)]
        return Comparison(ratio, ratio - 0.1, ratio + 0.1, (1.0,), (ratio,), (), "rounds", "")

    monkeypatch.setattr(Provider, "kernel", kernel)
    monkeypatch.setattr(HERE, "compare", compare)
    yield ratios


def host() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), LlamaMLP(8, 12), nn.ModuleList([nn.Linear(8, 8)])[0],
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), esper.nn.Bottleneck(8, 3)),
        nn.Linear(8, 2),
    )


def test_outermost_wins_and_everything_else_has_a_reason(
    speed: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed |= {7: 1.5, 4: 0.8}  # the MLP with its norm and residual; the bottleneck
    model = host()
    report = esper.accelerate(model, torch.randn(16, 4), library=tmp_path)
    rows = {r.name: r for r in report.rows}
    assert rows["1"].replaced and rows["1"].speedup == (1.5, 1.4, 1.6)
    assert "1.norm" not in rows  # below a match there is nothing to do
    assert not rows[""].replaced and "3.1 (BatchNorm1d)" in rows[""].reason
    assert not rows["3"].replaced and "1 (BatchNorm1d)" in rows["3"].reason
    assert not rows["3.2"].replaced and "slower" in rows["3.2"].reason
    assert rows["3.2"].speedup == (0.8, pytest.approx(0.7), 0.9)
    printed = capsys.readouterr().out
    assert str(report) in printed and "1 of 4 modules accelerated" in printed
    assert "0.80 [0.70, 0.90]" in printed
    assert esper.nn.path(model[1]) == "kernel k-7" and esper.nn.path(model[3][2]) == "plain"


def test_where_the_outer_one_is_refused_the_inner_ones_are_tried(
    speed: dict[int, float], tmp_path: Path
) -> None:
    speed[3] = 1.2
    report = esper.accelerate(TransformerBlock(8, 2), torch.randn(2, 5, 8), library=tmp_path)
    rows = {r.name: r for r in report.rows}
    assert rows[""].reason == "its kernel is REJECTED: too wrong" and rows["mlp"].replaced


def test_twice_is_once_and_undo_is_complete(speed: dict[int, float], tmp_path: Path) -> None:
    speed |= {7: 1.5, 4: 1.5}
    model = host().train()
    flags = [m.training for m in model.modules()]
    states = [dict(m.__dict__) for m in model.modules()]
    statistics = model[3][1].running_mean.clone()
    first = esper.accelerate(model, torch.randn(16, 4), library=tmp_path)
    installed = model[1].__dict__["forward"]
    second = esper.accelerate(model, torch.randn(16, 4), library=tmp_path)
    assert model[1].__dict__["forward"] is installed
    assert "already" in {r.name: r for r in second.rows}[""].reason
    assert [r.name for r in first.replaced] == [r.name for r in second.replaced] == ["1", "3.2"]
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(model[3][1].running_mean, statistics)
    second.undo()
    assert states == [m.__dict__ for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_what_could_run_in_evaluation_only_gives_way_while_training(
    speed: dict[int, float], tmp_path: Path
) -> None:
    speed[3] = 1.2
    inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model = nn.Sequential(inner, nn.Dropout(0.1))
    rows = {r.name: r for r in esper.accelerate(model, torch.randn(2, 8), library=tmp_path).rows}
    assert "dropout of 0.1" in rows[""].reason and rows["0"].replaced
    esper.nn.undo(model.eval())
    (row,) = esper.accelerate(model, torch.randn(2, 8), library=tmp_path).rows
    assert row.replaced and "in eval mode only" in row.reason
    assert esper.nn.path(model.train(), torch.randn(2, 8)).startswith("plain")


def test_a_measurement_is_shared_by_modules_of_one_type_only(
    speed: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel may stand for two types, whose plain forwards differ in speed."""

    class Other(LlamaMLP):
        pass

    measured: list[nn.Module] = []
    measure = HERE._measure
    monkeypatch.setattr(HERE, "_measure", lambda module, *rest: (
        measured.append(module) or measure(module, *rest)))
    speed[7] = 1.2
    model = nn.Sequential(LlamaMLP(8, 12), LlamaMLP(8, 12), Other(8, 12))
    report = esper.accelerate(model, torch.randn(4, 8), library=tmp_path)
    assert [r.name for r in report.replaced] == ["0", "1", "2"]
    assert measured == [model[0], model[2]]


def test_examples_may_be_tuples_and_mappings(speed: dict[int, float], tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.unused = LlamaMLP(8, 12), esper.nn.Bottleneck(8, 4)

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + shift

    speed[7] = 1.0
    for example in ((torch.randn(2, 8), torch.ones(8)),
                    {"x": torch.randn(2, 8), "shift": torch.ones(8)}):
        rows = {r.name: r for r in esper.accelerate(Two(), example, library=tmp_path).rows}
        assert rows["mlp"].replaced
        assert "more than one tensor" in rows[""].reason
        assert "does not reach" in rows["unused"].reason


# -- with a compiler ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The example's library, and what the example printed."""
    folder = tmp_path_factory.mktemp("example")
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples/accelerate.py")], cwd=folder, text=True,
        capture_output=True, timeout=540, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "compiling 1 for features[32]" in ran.stderr and "proving 1" in ran.stderr
    return folder / "library", ran.stdout


@pytest.mark.slow
def test_the_example_says_what_became_of_every_module(accelerated: tuple[Path, str]) -> None:
    library, out = accelerated
    assert "3 (BatchNorm1d)" in out
    (kernel,) = LocalLibrary(library).kernels()
    assert kernel.status is KernelStatus.VALIDATED and kernel.manifest.signature.standalone
    # Whether it is faster is for the machine of that day to say; that it was measured is not.
    assert out.count("kernel k-") + out.count("slower than the plain module") >= 2


@pytest.mark.slow
def test_a_compiled_kernel_is_as_right_as_eager_and_trains_the_same(
    accelerated: tuple[Path, str],
) -> None:
    torch.manual_seed(0)
    module = MLP(32)
    x = torch.randn(37, 32)
    found = match(module, x)
    with Provider(LocalLibrary(accelerated[0]), Pipeline.STANDARD, print) as provider:
        fast = HERE.prepare("mlp", module, x, provider)
    twin = copy.deepcopy(module)
    module.__dict__["forward"] = fast
    oracle = Oracle(found.ir, found.signature)
    for seed in range(3):
        torch.manual_seed(seed)
        h, g = torch.randn(37, 32, requires_grad=True), torch.randn(37, 32)
        out = module(h)
        grads = torch.autograd.grad(out, [h, *tensors(module, found.weights)], g)
        oracle.add([out.detach(), *grads], Problem(
            h.detach(), tuple(t.detach() for t in tensors(module, found.weights)), g, 1.0, 2))
    assert not oracle.refusal
    pair = [(m, torch.optim.AdamW(m.parameters(), lr=1e-2)) for m in (module, twin)]
    for _ in range(20):
        for m, optimizer in pair:
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert esper.nn.path(module, x).startswith("kernel k-")
    truth = apply(found.ir, found.signature, x, tensors(module, found.weights))
    for quietly in (torch.no_grad(), torch.inference_mode()):
        with quietly:
            torch.testing.assert_close(module(x), truth)
    z = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(
            module(z).sum(), z, create_graph=True)[0].sum(), z)
    twins = copy.deepcopy(module)
    assert torch.equal(twins(x), module(x)) and esper.nn.path(twins, x).startswith("kernel k-")
