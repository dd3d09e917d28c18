"""The blend, with the extension and without it, against torch in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina import blend as blending
from esper.kasmina import native
from esper.kasmina.blend import blend

# Half a unit in the last place of the type, and the rounding of the reference's own inputs.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["native", "torch", "no extension"], autouse=True)
def face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One contract, whoever blends. Triton's kernels keep it too: tests/triton_kernels."""
    def forget() -> None:
        native.extension.cache_clear()
        blending._chosen.clear()

    forget()
    if request.param == "no extension":
        monkeypatch.setenv(native.DISABLE, "1")
    else:
        if native.extension() is None:
            pytest.skip("the extension is not built for this environment (see `esper doctor`)")
        monkeypatch.setenv(blending.OVERRIDE, request.param)
    yield request.param
    monkeypatch.undo()
    forget()


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


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3),
    "every other": lambda t: t[:, ::2],
    "expanded": lambda t: t[:, :1].expand(-1, 6, -1, -1),
    "overlapping": lambda t: t.as_strided((2, 3, 4, 5), (7, 3, 2, 1)),
    "between vectors": lambda t: t.flatten()[1:],
    "negated lazily": lambda t: torch.view_as_complex(t.reshape(-1, 2)).conj().imag,
}


@pytest.mark.parametrize("of_s", LAYOUTS)
@pytest.mark.parametrize("of_h", LAYOUTS)
def test_any_strides(of_h: str, of_s: str) -> None:
    """Values, layout and gradients are torch's own, whatever the layouts."""
    h, s = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    x, y = LAYOUTS[of_h](h), LAYOUTS[of_s](s)
    if x.shape != y.shape:
        x, y = x.flatten()[: min(x.numel(), y.numel())], y.flatten()[: min(x.numel(), y.numel())]
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    out, want = blend(*leaves, 0.25, reuse=True), torch.lerp(*leaves, 0.25)
    assert torch.equal(out, want) and out.stride() == want.stride()
    grad = torch.randn(want.shape[::-1]).permute(*reversed(range(want.ndim)))
    for got, wanted in zip(torch.autograd.grad(out, leaves, grad),
                           torch.autograd.grad(want, leaves, grad), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_unused_side_does_not_leak(dtype: torch.dtype, bad: float) -> None:
    good, hostile = pair((5,), dtype)
    with torch.no_grad():
        hostile.fill_(bad)
    assert blend(good, hostile, 0.0, reuse=True) is good
    assert blend(hostile, good, 1.0, reuse=True) is good
    blend(good, hostile, 0.0).sum().backward()
    assert hostile.grad is None and torch.equal(good.grad, torch.ones(5, dtype=dtype))


# -- the seed's memory ----------------------------------------------------------------------


def test_reuse_writes_into_the_seed(face: str) -> None:
    h, w = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    s = w * 2  # saved by nobody
    want = torch.lerp(h, s, 0.25).detach()
    out = blend(h, s, 0.25, reuse=True)
    assert (out is s) == (face == "native")  # a permission: torch's lerp does not use it
    assert torch.equal(out, want)
    out.sum().backward()
    assert torch.equal(h.grad, torch.full((6,), 0.75))
    assert torch.equal(w.grad, torch.full((6,), 0.5))


def _leaf(h: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.randn(6, requires_grad=True)
    return s, s


def _view(h: Tensor) -> tuple[Tensor, Tensor]:
    base = torch.randn(2, 6)
    return base[1], base


def _detached(h: Tensor) -> tuple[Tensor, Tensor]:
    base = torch.randn(6, requires_grad=True) * 2
    return base.detach(), base


def _saved_by_its_producer(h: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.randn(6, requires_grad=True).exp()
    return s, s


def _host_itself(h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h


def _part_of_the_host(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.detach(), h


def _inference(h: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        s = torch.randn(6)
    return s, s


@pytest.mark.parametrize(
    "make", [_leaf, _view, _detached, _saved_by_its_producer, _host_itself, _part_of_the_host,
             _inference],
)
def test_reuse_leaves_alone_what_others_see(make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    h = torch.randn(6, requires_grad=True) * 1
    s, seen = make(h)
    before = seen.detach().clone()
    out = blend(h, s, 0.25, reuse=True)
    assert torch.equal(seen.detach(), before)
    assert torch.equal(out.detach(), torch.lerp(h.detach(), s.detach(), 0.25))
    out.sum().backward()  # nothing that was saved has changed


def test_reuse_under_no_grad_keeps_histories_true() -> None:
    h, w = torch.randn(6), torch.randn(6, requires_grad=True)
    s = w * 2
    before = s.detach().clone()
    with torch.no_grad():
        out = blend(h, s, 0.25, reuse=True)
    assert torch.equal(s.detach(), before) and not out.requires_grad
    with torch.inference_mode():
        s = torch.randn(6)
        want = torch.lerp(h, s, 0.25)
        assert torch.equal(blend(h, s, 0.25, reuse=True), want)


def test_a_second_use_of_the_seed_is_noticed(face: str) -> None:
    w = torch.randn(6, requires_grad=True)
    s = w * 2
    square = s * s  # saves s
    blend(torch.randn(6), s, 0.25, reuse=True)
    if face == "native":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()
    else:
        square.sum().backward()


def test_gradients_that_others_hold_are_not_written_to() -> None:
    h, w = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    out = blend(h, w * 1, 0.25)
    seen = []
    out.register_hook(seen.append)
    out.retain_grad()
    given = torch.ones(6)
    out.backward(given, retain_graph=True)
    assert torch.equal(given, torch.ones(6)) and torch.equal(out.grad, torch.ones(6))
    assert torch.equal(seen[0], torch.ones(6))
    out.backward(given)  # the graph still stands
    assert torch.equal(h.grad, torch.full((6,), 1.5))


# -- autograd, transforms, compilers --------------------------------------------------------


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


@pytest.mark.parametrize("reuse", [False, True])
def test_every_derivative(reuse: bool) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return blend(a, b * 1, 0.3, reuse=reuse)

    h, s = pair((3, 4), torch.float64)
    assert torch.autograd.gradcheck(
        f, (h, s), check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda a, b: f(a, b).square(), (h, s))
    assert torch.autograd.gradgradcheck(f, (h.detach().mT.requires_grad_(), s.detach().mT))


def test_transforms_of_functions() -> None:
    h, s = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(torch.vmap(lambda a, b: blend(a, b, 0.25, reuse=True))(h, s),
                       torch.lerp(h, s, 0.25))
    g = torch.func.grad(lambda a: blend(a, s, 0.25).sum())(h)
    assert torch.equal(g, torch.full((3, 4), 0.75))


def test_in_a_compiled_model() -> None:
    h, s = pair((3, 4), torch.float32)
    compiled = torch.compile(lambda a, b: blend(a, b, 0.25), backend="aot_eager", fullgraph=True)
    out = compiled(h, s)
    assert torch.equal(out, torch.lerp(h, s, 0.25))
    torch._dynamo.reset()


def test_under_autocast_types_stay() -> None:
    h, s = torch.randn(6), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blend(h, s, 0.25), torch.lerp(h, s, 0.25))


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


SAME_BITS = """
import torch
from esper.kasmina import native
blend = native.extension().blend
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    h, s, g = (torch.randn(70003).to(dtype) for _ in range(3))
    h.requires_grad_(), s.requires_grad_()
    for alpha in (0.3, 0.5, 0.9375):
        ours, peer = blend(h, s, alpha), torch.lerp(h, s, alpha)
        # All but the tail, which torch computes without fused multiply-add.
        assert torch.equal(ours[:69632], peer[:69632]), (dtype, alpha)
        torch.testing.assert_close(ours, peer)
        for a, b in zip(torch.autograd.grad(ours, (h, s), g), torch.autograd.grad(peer, (h, s), g)):
            assert torch.equal(a, b), (dtype, alpha)
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_every_set_of_instructions_gives_the_bits_of_torch(capability: str, face: str) -> None:
    """The loops are compiled once for each; torch's own variable says which are used."""
    if face != "native":
        pytest.skip("only the extension has loops of its own")
    done = subprocess.run(
        [sys.executable, "-c", SAME_BITS], capture_output=True, text=True, check=False,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stderr


# -- who blends -----------------------------------------------------------------------------


def test_the_choice_comes_from_a_measurement(monkeypatch: pytest.MonkeyPatch, face: str) -> None:
    monkeypatch.delenv(blending.OVERRIDE, raising=False)
    cpu = torch.device("cpu")
    assert blending.chosen(cpu, torch.float32) == ("torch" if face == "no extension" else "native")

    # A kind of device that the table does not have: here the CPU, as if it were new.
    blending._chosen.clear()
    monkeypatch.setattr(blending, "_MEASURED", {})
    monkeypatch.setattr(blending, "_PROBE", 1 << 14)
    measured = []

    def measure(*given: Any) -> dict[str, float]:
        measured.append(seconds := really(*given))
        return seconds

    really = blending._measure
    monkeypatch.setattr(blending, "_measure", measure)
    # No mode of the caller's reaches the measurement.
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = blending.chosen(cpu, torch.float32)
        assert blending.chosen(cpu, torch.float32) == first
    if face == "no extension":
        assert first == "torch" and not measured  # nothing to choose from
    else:
        assert len(measured) == 1 and measured[0].keys() == {"native", "torch"}
        assert first == min(measured[0], key=measured[0].__getitem__)


@pytest.mark.parametrize(
    ("value", "message"),
    [("natvie", "nearest is native"), ("TORCH", "nearest is"), ("triton", "cannot be had")],
)
def test_an_override_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(blending.OVERRIDE, value)
    with pytest.raises(ValueError, match=message):
        blend(torch.zeros(3), torch.zeros(3), 0.5)
