"""The dispatcher's operators, held to torch's own checks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import native
from esper.kasmina.sites import Found
from esper.kasmina.slot import Slot
from esper.leyline.mode import FULL, GRAFTING, TRAINING
from esper.leyline.signature import DType, SiteKind, SiteSignature
from tests.csrc.pair import BACKWARD_INPUTS, CHANNELS, GRADIENTS, Forward, compile_pair, parameters

pytestmark = pytest.mark.slow
ANY = pytest.mark.parametrize("mode", [TRAINING, GRAFTING, FULL])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def running(mode: int, alpha: float = 0.3, dtype: torch.dtype = torch.float64) -> Any:
    extension: Any = native.extension()
    kernel = extension.SeedKernel(*compile_pair(dtype=dtype), BACKWARD_INPUTS, GRADIENTS, "cpu",
                                  str(dtype).removeprefix("torch."))
    params = parameters(dtype)
    seed = extension.RunningSeed(kernel, params)
    seed.set(alpha, mode)
    return seed, params


@pytest.fixture()
def slot() -> Any:
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=CHANNELS, dtype=DType.FLOAT64)
    slot = Slot(Found("site", nn.Identity(), signature, 1))
    yield slot
    slot.close()


def op(h: Tensor, slot: Slot, anchor: Tensor | None = None) -> Tensor:
    return torch.ops.esper.slot(h, anchor, slot.number)


def layouts() -> list[Tensor]:
    wide = torch.randn(6, 2 * CHANNELS, dtype=torch.float64)
    turned = torch.randn(CHANNELS, 5, dtype=torch.float64).T
    return [wide[:5, :CHANNELS].clone(), turned, wide[:, ::2]]


@pytest.mark.parametrize("mode", [None, TRAINING, GRAFTING, FULL])
def test_opcheck(slot: Slot, mode: int | None) -> None:
    if mode is not None:
        seed, _params = running(mode)
        slot._native.set_seeds([seed])
    for h in layouts() if mode in (None, FULL) else layouts()[:1]:
        torch.library.opcheck(torch.ops.esper.slot, (h, slot.anchor, slot.number))
        learning = h.detach().requires_grad_()
        torch.library.opcheck(torch.ops.esper.slot, (learning, None, slot.number))
        torch.library.opcheck(torch.ops.esper.slot_forward, (h, slot.number, True))
        _out, ticket = torch.ops.esper.slot_forward(h, slot.number, True)
        torch.library.opcheck(torch.ops.esper.slot_backward, (torch.randn_like(h), h, ticket))


def test_fake_shapes_for_images_in_either_order(slot: Slot) -> None:
    image = torch.randn(2, 3, 4, 5)
    for h in (image, image.to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.esper.slot, (h.requires_grad_(), None, slot.number))
        assert op(h, slot).stride() == h.stride()


def test_gradcheck_full(slot: Slot) -> None:
    seed, params = running(FULL)
    slot._native.set_seeds([seed])
    h = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True)
    kernel = seed.kernel
    for alpha in (0.3, 1.0):
        torch.autograd.gradcheck(lambda h, *p, a=alpha: kernel(h, list(p), a, FULL), (h, *params))
        seed.set(alpha, FULL)
        torch.autograd.gradcheck(seed, (h,))
        torch.autograd.gradcheck(lambda h: op(h, slot), (h,))


def test_gradcheck_grafting(slot: Slot) -> None:
    """The parameters' gradients are those of the output; h's is what the mode says it is."""
    seed, params = running(GRAFTING)
    kernel = seed.kernel
    h = torch.randn(3, CHANNELS, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *p: kernel(h, list(p), 0.3, GRAFTING), tuple(params))
    slot._native.set_seeds([seed])
    grad = torch.randn_like(h)
    for call in (seed, lambda h: op(h, slot)):
        leaf = h.clone().requires_grad_()
        (got,) = torch.autograd.grad(call(leaf), leaf, grad)
        torch.testing.assert_close(got, 0.7 * grad)


@ANY
@pytest.mark.parametrize("frozen", [False, True])
def test_a_slot_gives_parameters_the_gradients_of_eager(
    slot: Slot, mode: int, frozen: bool
) -> None:
    seed, params = running(mode)
    slot._native.set_seeds([seed])
    h = torch.randn(7, CHANNELS, dtype=torch.float64, requires_grad=not frozen)
    out = op(h, slot, slot.anchor if frozen else None)
    grad = torch.randn_like(out)
    out.backward(grad, retain_graph=True)
    once = [p.grad.clone() for p in params]
    leaves = [p.detach().requires_grad_() for p in params]
    alpha = torch.tensor(1.0 if mode == TRAINING else 0.3, dtype=torch.float64)
    expected = Forward()(h.detach(), alpha, *leaves)[0]
    for got, want in zip(once, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, h if mode == TRAINING else expected, rtol=1e-6, atol=1e-7)
    out.backward(grad)
    for p, first in zip(params, once, strict=True):
        torch.testing.assert_close(p.grad, 2 * first)


def test_several_seeds_behind_one_slot(slot: Slot) -> None:
    """A full one, one that learns from its output, and one that is blended in."""
    seeds, params = zip(*(running(m) for m in (FULL, TRAINING, GRAFTING)), strict=True)
    slot._native.set_seeds(list(seeds))
    h = torch.randn(4, CHANNELS, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(h)
    op(h, slot).backward(grad)
    got = [h.grad, *(p.grad for ps in params for p in ps)]

    leaf = h.detach().requires_grad_()
    first, second, third = ([p.detach().requires_grad_() for p in ps] for ps in params)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    x = Forward()(leaf, alpha, *first)[0]
    x.retain_grad()
    s = Forward()(x.detach(), one, *third)[0]
    (x + alpha * (s - x)).backward(grad)
    Forward()(x.detach(), one, *second)[0].backward(x.grad)
    for a, b in zip(got, [leaf.grad, *(p.grad for p in (*first, *second, *third))], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_result_shares_no_memory_with_what_is_saved(slot: Slot) -> None:
    """A compiler overwrites results in place: the backward must not read them."""
    seeds, params = zip(*(running(m) for m in (FULL, TRAINING)), strict=True)
    slot._native.set_seeds(list(seeds))
    h = torch.randn(4, CHANNELS, dtype=torch.float64)
    grads = []
    for spoil in (False, True):
        out, ticket = torch.ops.esper.slot_forward(h, slot.number, True)
        assert out.data_ptr() != h.data_ptr()
        if spoil:
            out.fill_(float("nan"))
        g, _nothing = torch.ops.esper.slot_backward(torch.ones_like(h), h, ticket)
        grads.append([g, *(p.grad.clone() for ps in params for p in ps)])
        for p in (p for ps in params for p in ps):
            p.grad = None
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_changed_before_the_backward_ends_the_seed(slot: Slot) -> None:
    seed, params = running(FULL)
    slot._native.set_seeds([seed])
    h = torch.randn(4, CHANNELS, dtype=torch.float64, requires_grad=True)
    out = op(h, slot)
    with torch.no_grad():
        params[2].add_(1.0)
    out.sum().backward()
    assert "modified by an inplace operation" in seed.failure
    assert all(p.grad is None for p in params)


def test_a_kernel_that_fails_behind_a_slot(slot: Slot) -> None:
    seed, _params = running(FULL, dtype=torch.float32)
    slot._native.set_seeds([seed])
    h = torch.randn(4, CHANNELS + 1, requires_grad=True)  # sizes that the kernel cannot take
    out = op(h, slot)
    assert torch.equal(out, h) and seed.failure
    out.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def vmap(run: Any, h: Tensor) -> Tensor:
    return torch.func.vmap(run)(h)


def func_grad(run: Any, h: Tensor) -> Tensor:
    return torch.func.grad(lambda h: run(h).square().sum())(h)


def forward_mode(run: Any, h: Tensor) -> Tensor:
    return torch.func.jvp(run, (h,), (torch.ones_like(h),))[1]


@ANY
@pytest.mark.parametrize("transform", [vmap, func_grad, forward_mode])
def test_a_transform_passes_only_where_no_seed_is(slot: Slot, mode: int, transform: Any) -> None:
    h = torch.randn(4, CHANNELS, dtype=torch.float64)
    run = functools.partial(op, slot=slot)
    assert torch.equal(transform(run, h), transform(torch.clone, h))
    seed, _params = running(mode)
    slot._native.set_seeds([seed])
    with pytest.raises(ValueError, match="under a transform"):
        transform(run, h)
    assert not seed.failure


def test_a_lazily_negated_tensor(slot: Slot) -> None:
    seed, _params = running(FULL)
    slot._native.set_seeds([seed])
    h = torch.randn(4, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(op(torch._neg_view(h), slot), op(-h, slot))


def test_a_slot_that_is_gone_passes_its_tensor_on(slot: Slot) -> None:
    h = torch.randn(4, CHANNELS, requires_grad=True)
    out = torch.ops.esper.slot(h, None, 1 << 40)
    assert torch.equal(out, h)
    out.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def test_what_is_no_ticket_is_refused(slot: Slot) -> None:
    h = torch.randn(4, CHANNELS, dtype=torch.float64)
    with pytest.raises(ValueError, match="no ticket of its forward"):
        torch.ops.esper.slot_backward(h, h, torch.zeros(3))
    seed, _params = running(FULL)
    slot._native.set_seeds([seed])
    ticket = torch.ops.esper.slot_forward(h, slot.number, True)[1].clone()
    with pytest.raises(RuntimeError, match="replaced by a copy and freed"):
        torch.ops.esper.slot_backward(h, h, ticket)


@ANY
def test_a_second_derivative_is_refused(slot: Slot, mode: int) -> None:
    seed, _params = running(mode)
    slot._native.set_seeds([seed])
    h = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(op(h, slot).square().sum(), h, create_graph=True)
