"""A compiled pair on a CUDA device, as a seed's node and behind a slot, for whoever has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.kasmina import native
from esper.leyline.mode import FULL, GRAFTING
from tests.csrc.pair import BACKWARD_INPUTS, CHANNELS, GRADIENTS, compile_pair, parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def kernel() -> Any:
    return native.open_kernel(*compile_pair("cuda"), BACKWARD_INPUTS, GRADIENTS, "cuda")


def eager(h: torch.Tensor, params: list[torch.Tensor], alpha: float) -> torch.Tensor:
    w1, b1, w2, b2 = params
    linear = torch.nn.functional.linear
    return torch.lerp(h, linear(torch.tanh(linear(h, w1, b1)), w2, b2), alpha)


@pytest.mark.parametrize("mode", [GRAFTING, FULL])
@pytest.mark.parametrize("batch", [1, 33])
def test_output_and_gradients(kernel: Any, mode: int, batch: int) -> None:
    torch.manual_seed(0)
    h = torch.randn(batch, CHANNELS, device="cuda", requires_grad=True)
    params, grad = parameters(device="cuda"), torch.randn(batch, CHANNELS, device="cuda")
    got = torch.autograd.grad(kernel(h, params, 0.3, mode), [h, *params], grad)
    host, seen = (h.detach().double().requires_grad_() for _ in range(2))
    p64 = [p.detach().double().requires_grad_() for p in params]
    out = host + 0.3 * (eager(seen if mode == GRAFTING else host, p64, 1.0) - host)
    want = torch.autograd.grad(out, [host, *p64], grad.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_on_a_side_stream_and_behind_a_slot(kernel: Any) -> None:
    extension = native.extension()
    assert extension is not None and extension.with_cuda, "built with CUDA where there is a GPU"
    params = parameters(device="cuda")
    seed, slot = extension.RunningSeed(kernel, params), extension.Slot()
    seed.set(1.0, FULL)
    slot.set_seeds([seed])
    h = torch.randn(5, CHANNELS, device="cuda", requires_grad=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = torch.ops.esper.slot(h * 1, None, slot.number)
        out.sum().backward()
    torch.cuda.synchronize()
    assert not seed.failure
    torch.testing.assert_close(out, eager(h, params, 1.0), rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None for p in params)
