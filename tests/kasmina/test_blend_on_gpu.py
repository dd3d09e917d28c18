"""The blend on a CUDA device, for whoever has one: all implementations, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esper.kasmina import blend as blending
from esper.kasmina import native
from esper.kasmina.blend import blend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

EPSILONS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(params=blending.NAMES)
def implementation(request: pytest.FixtureRequest,
                   monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    blending._chosen.clear()
    if request.param not in blending._available(torch.device("cuda")):
        pytest.skip(f"{request.param} is not built or installed here (see `esper doctor`)")
    monkeypatch.setenv(blending.OVERRIDE, request.param)
    yield request.param
    blending._chosen.clear()


@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (33, 65), (0, 4), (3, 70001), (1 << 22,)])
@pytest.mark.parametrize("alpha", [0.3, 0.9375])
def test_output_and_gradients(
    implementation: str, dtype: torch.dtype, shape: tuple[int, ...], alpha: float
) -> None:
    torch.manual_seed(0)
    h, s = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape, device="cuda").to(dtype)
    out = blend(h, s * 1, alpha, reuse=True)
    got = (out, *torch.autograd.grad(out, (h, s), grad))
    wanted = (torch.lerp(h.detach().double(), s.detach().double(), alpha),
              (1 - alpha) * grad.double(), alpha * grad.double())
    for one, want in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), want, rtol=EPSILONS[dtype], atol=EPSILONS[dtype])


def test_layouts(implementation: str) -> None:
    h, s = (torch.randn(2, 6, 4, 5, device="cuda") for _ in range(2))
    last = torch.channels_last
    for x, y in (
        (h.transpose(1, 3), s.transpose(1, 3)),
        (h.to(memory_format=last), s.to(memory_format=last)),
        (h.to(memory_format=last), s),
        (h[:, ::2], s[:, ::2]),
        (h[:, :1].expand(-1, 6, -1, -1), s),
        (h.flatten()[1:], s.flatten()[1:]),  # between 16-byte accesses
    ):
        torch.testing.assert_close(blend(x, y, 0.25), torch.lerp(x, y, 0.25))


def test_on_a_side_stream(implementation: str) -> None:
    """Work is queued on the current stream: behind what made the inputs, before what follows."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.ones(2048, 2048, device="cuda")
        slow = x
        for _ in range(20):
            slow = slow @ x / 2048
        h, s = slow.requires_grad_(), (slow * 3).detach().requires_grad_()
        out = blend(h, s, 0.5)
        g_h, g_s = torch.autograd.grad(out, (h, s), torch.ones_like(out))
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, torch.full_like(out, 2.0))
    assert torch.equal(g_h, torch.full_like(out, 0.5)) and torch.equal(g_s, g_h)


def test_reuse_keeps_the_memory(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("only the extension writes into the seed's memory")
    h = torch.randn(1 << 20, device="cuda", requires_grad=True)
    s = torch.randn(1 << 20, device="cuda", requires_grad=True) * 1
    address = s.data_ptr()
    assert blend(h, s, 0.5, reuse=True).data_ptr() == address


def test_in_a_captured_graph(implementation: str) -> None:
    h, s = (torch.randn(1000, device="cuda") for _ in range(2))
    blend(h, s, 0.5)  # compiles, outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = blend(h, s, 0.5)
    h.add_(1)
    graph.replay()
    torch.testing.assert_close(out, torch.lerp(h, s, 0.5))


def test_measured_where_it_is() -> None:
    blending._chosen.clear()
    native.extension.cache_clear()
    assert blending.chosen(torch.device("cuda", 0), torch.float32) in blending.NAMES
