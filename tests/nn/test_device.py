"""Which Triton kernel is given which tensors on CUDA. No GPU is needed for that, and none was
there: plain functions stand where Triton's would be."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.nn.device import device_kernel
from esper.nn.trace import Match, match, tensors
from esper.nn.values import NoMatch


def gated_mlp(x: Tensor, w_gate: Tensor, b_gate: Tensor | None, w_up: Tensor,
              b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up), w_down, b_down)


def low_rank(x: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None = None) -> Tensor:
    return F.linear(F.linear(x, w_down), w_up, b_up)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "esper.triton_kernels", ModuleType("esper.triton_kernels"))
    for function in (gated_mlp, low_rank):
        module = ModuleType(function.__name__)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"esper.triton_kernels.{function.__name__}", module)


class UpFirst(nn.Module):
    """The product the other way round, so that neither order nor names give it away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(*io) for io in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * F.silu(self.b(x)))


def on_cuda(module: nn.Module) -> tuple[Match, Tensor]:
    x = torch.randn(3, 8)
    found = match(module, x)
    return replace(found, signature=found.signature.model_copy(update={"device": "cuda"})), x


@pytest.mark.parametrize("module", [
    esper.nn.GatedMLP(8, 12), esper.nn.GatedMLP(8, 12, bias=True), UpFirst(),
    esper.nn.LowRank(8, 2), nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8)),
])
def test_triton_is_given_the_right_tensors(module: nn.Module, triton: None) -> None:
    for p in module.parameters():
        nn.init.normal_(p)
    found, x = on_cuda(module)
    kernel, name = device_kernel(found)
    assert name.startswith("Triton's")
    torch.testing.assert_close(kernel(x, tensors(module, found.weights), 1.0, 2), module(x))


def test_other_graphs_have_no_kernel_there(triton: None) -> None:
    for module in (esper.nn.Bottleneck(8, 4), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))):
        with pytest.raises(NoMatch, match=r"no kernel for it on cuda|inner layer has a bias"):
            device_kernel(on_cuda(module)[0])


class GatedMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Conv2d(*io, 1) for io in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("module", [
    nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 1)), GatedMap(),
])
def test_maps_have_no_kernel_there(module: nn.Module, triton: None) -> None:
    """Their graphs are the same, in convolutions of one pixel."""
    found = match(module, torch.randn(2, 8, 3, 3))
    there = replace(found, signature=found.signature.model_copy(update={"device": "cuda"}))
    with pytest.raises(NoMatch, match="channels last"):
        device_kernel(there)


def test_double_precision_has_no_kernel_there(triton: None) -> None:
    found = match(esper.nn.GatedMLP(8, 12).double(), torch.randn(3, 8).double())
    there = replace(found, signature=found.signature.model_copy(update={"device": "cuda"}))
    with pytest.raises(NoMatch, match="float64"):
        device_kernel(there)


def test_without_triton_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "esper.triton_kernels.gated_mlp", None)
    with pytest.raises(NoMatch, match="Triton, or its gated_mlp, is not installed"):
        device_kernel(on_cuda(esper.nn.GatedMLP(8, 12))[0])
