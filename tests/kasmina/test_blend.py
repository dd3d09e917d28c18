"""The blend, with the extension and without it, against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper.kasmina import native
from esper.kasmina.blend import blend

# Half a unit in the last place of the type, and the rounding of the reference's own inputs.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["extension", "python"], autouse=True)
def _face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.extension.cache_clear()
    if request.param == "python":
        monkeypatch.setenv(native.DISABLE, "1")
    elif native.extension() is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    yield
    monkeypatch.undo()
    native.extension.cache_clear()


def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, s = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return h.requires_grad_(), s.requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (33, 65), (0, 4), (3, 70001), ()])
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    h, s = pair(shape, dtype)
    grad = torch.randn(shape).to(dtype)
    out = blend(h, s, 0.3)
    tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype and out.shape == h.shape
    expected = torch.lerp(h.detach().double(), s.detach().double(), 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    g_h, g_s = torch.autograd.grad(out, (h, s), grad)
    torch.testing.assert_close(g_h.double(), 0.7 * grad.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(g_s.double(), 0.3 * grad.double(), rtol=tolerance, atol=tolerance)


def test_strided_inputs_and_gradients() -> None:
    h, s = pair((8, 5), torch.float32)
    out = blend(h.T, s.T, 0.25)
    torch.testing.assert_close(out, torch.lerp(h.T, s.T, 0.25))
    blend(h, s, 0.25).T.sum().backward()
    assert torch.equal(h.grad, torch.full((8, 5), 0.75))


def test_a_view_that_starts_between_vectors() -> None:
    h, s = torch.randn(1000)[1:], torch.randn(1001)[2:]
    torch.testing.assert_close(blend(h, s, 0.5), torch.lerp(h, s, 0.5))


def test_the_ends_are_the_very_tensors() -> None:
    h, s = pair((4,), torch.float32)
    assert blend(h, s, 0.0) is h
    assert blend(h, s, 1.0) is s


def test_one_side_may_be_frozen() -> None:
    h, s = pair((4,), torch.float32)
    blend(h.detach(), s, 0.25).sum().backward()
    assert h.grad is None and torch.equal(s.grad, torch.full((4,), 0.25))
    blend(h, s.detach(), 0.25).sum().backward()
    assert torch.equal(h.grad, torch.full((4,), 0.75))
    with torch.no_grad():
        assert blend(h, s, 0.25).grad_fn is None


def test_every_derivative() -> None:
    h, s = pair((3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: blend(a, b, 0.3), (h, s))
    assert torch.autograd.gradgradcheck(lambda a, b: blend(a, b, 0.3).square(), (h, s))


@pytest.mark.parametrize(
    ("h", "s", "alpha", "message"),
    [
        (torch.zeros(3), torch.zeros(4), 0.5, "same shape"),
        (torch.zeros(3), torch.zeros(3).double(), 0.5, "same shape"),
        (torch.zeros(3).long(), torch.zeros(3).long(), 0.5, "floating point"),
        (torch.zeros(3), torch.zeros(3), -0.1, "within 0 and 1"),
        (torch.zeros(3), torch.zeros(3), float("nan"), "within 0 and 1"),
    ],
)
def test_what_cannot_be_blended(h: Tensor, s: Tensor, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend(h, s, alpha)
