"""What a runner cannot follow, what fails in it, and what it must leave alone. Both faces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from esper.leyline.mode import FULL, GRAFTING, TRAINING
from tests.csrc.pair import CHANNELS, GRADIENTS, parameters
from tests.kasmina.test_runner import Host, close, expected, learnt

pytestmark = pytest.mark.slow
ANY = pytest.mark.parametrize("mode", [TRAINING, GRAFTING, FULL])
BACKWARD_FAILS = [*GRADIENTS[:-1], 9]  # an output that the backward does not have


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def vmap(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    torch.func.vmap(run)(h)


def func_grad(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    torch.func.grad(lambda h: run(h).sum())(h)


def func_grad_of_another(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    """h itself is not wrapped; what the kernel makes would be."""
    torch.func.grad(lambda other: (run(h) * other).sum())(h.clone())


def forward_mode(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(h, torch.ones_like(h)))


def fake(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    with FakeTensorMode() as mode:
        run(mode.from_tensor(h))


def jit_trace(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    torch.jit.trace(lambda h: run(h), (h,), check_trace=False)


def traced(run: Callable[[Tensor], Tensor], h: Tensor) -> None:
    make_fx(run)(h)


TRANSFORMS = [vmap, func_grad, func_grad_of_another, forward_mode, fake, jit_trace, traced]


@pytest.mark.filterwarnings("ignore:.*jit.trace.*")
@ANY
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_refused_and_no_failure(make: Any, mode: int, transform: Any) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    h = torch.randn(5, CHANNELS)
    with pytest.raises(ValueError, match="under a transform"):
        transform(host.runner, h)
    assert not host.runner.failure
    close(learnt(host, params, host(x)), expected(host, params, x, mode, 0.3))


@ANY
def test_a_mode_that_only_looks_on_changes_nothing(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    with FlopCounterMode(display=False):
        got = learnt(host, params, host(x))
    close(got, expected(host, params, x, mode, 0.3))
    assert not host.runner.failure


@ANY
def test_another_device_is_the_callers_mistake(make: Any, mode: int) -> None:
    runner, h = make(parameters()), torch.randn(3, CHANNELS, requires_grad=True) * 1
    runner.set(0.5, mode)
    with pytest.raises(ValueError, match="the kernel runs on cpu, h is on meta"):
        runner(h.to("meta"))
    assert not runner.failure
    runner(h).sum().backward()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_within_0_and_1(make: Any, alpha: float) -> None:
    with pytest.raises(ValueError, match="within 0 and 1"):
        make(parameters()).set(alpha, FULL)


@ANY
def test_what_is_lazily_negated(make: Any, mode: int) -> None:
    x, g = torch.randn(5, CHANNELS), torch.randn(5, CHANNELS)
    params = parameters()
    runner = make(params)
    runner.set(0.3, mode)
    results = []
    for negated in (torch._neg_view, torch.neg):
        for p in params:
            p.grad = None
        leaf = x.clone().requires_grad_()
        out = runner(negated(leaf))
        out.backward(negated(g))
        results.append([out, leaf.grad, *(p.grad for p in params)])
    assert not runner.failure
    close(*results)


@ANY
def test_a_backward_that_fails_stays_in_the_seed(make: Any, mode: int) -> None:
    params = parameters()
    runner, h = make(params, BACKWARD_FAILS), torch.randn(3, CHANNELS, requires_grad=True)
    runner.set(0.5, mode)
    grad = torch.randn(3, CHANNELS)
    (runner(h) * 1).backward(grad)
    assert runner.failure.startswith("backward: the kernel's backward returned 5 tensors")
    assert torch.equal(h.grad, grad) and all(p.grad is None for p in params)
    assert runner(h) is h


@pytest.mark.parametrize("mode", [GRAFTING, FULL])
def test_a_parameter_changed_before_the_backward_is_autograds_own_error(
    make: Any, mode: int
) -> None:
    params = parameters()
    runner, h = make(params), torch.randn(3, CHANNELS, requires_grad=True)
    runner.set(0.5, mode)
    out = runner(h)
    with torch.no_grad():
        params[2].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert not runner.failure


def asks_for_x(loss: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.autograd.grad(loss, x)


def asks_for_the_weight(loss: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.autograd.grad(loss, weight)


def inputs_x(loss: Tensor, x: Tensor, weight: Tensor) -> None:
    loss.backward(inputs=[x])


@ANY
@pytest.mark.parametrize("backward", [asks_for_x, asks_for_the_weight, inputs_x])
def test_a_backward_for_others_leaves_the_parameters_alone(
    make: Any, mode: int, backward: Any
) -> None:
    params, x = parameters(), torch.randn(5, 6, requires_grad=True)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    backward(host(x).square().sum(), x, host.first.weight)
    assert all(p.grad is None for p in params) and not host.runner.failure


@ANY
def test_who_waits_for_a_gradient_is_called(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    called: list[int] = []
    for i, p in enumerate(params):
        p.register_post_accumulate_grad_hook(lambda p, i=i: called.append(i))
    host(x).sum().backward()
    assert sorted(called) == [0, 1, 2, 3]


def test_two_hosts_at_one_kernel_in_different_states(make: Any) -> None:
    both, x = (parameters(), parameters()), torch.randn(5, 6)
    hosts = [Host(make(params)) for params in both]
    hosts[0].runner.set(0.0, TRAINING)
    hosts[1].runner.set(0.7, FULL)
    outs = [host(x) for host in hosts]  # both graphs are there before either backward
    for host, params, out, (mode, alpha) in zip(
        hosts, both, outs, ((TRAINING, 0.0), (FULL, 0.7)), strict=True
    ):
        close(learnt(host, params, out), expected(host, params, x, mode, alpha))
