"""How a seed runs: one contract, two faces, and under what torch does around a forward."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from esper.kasmina import native
from esper.kasmina.sites import Found
from esper.kasmina.slot import Slot
from esper.leyline.artifact import Pipeline
from esper.leyline.mode import FULL, GRAFTING, TRAINING
from esper.leyline.reference import initial_parameters
from esper.leyline.signature import SiteKind, SiteSignature
from tests.csrc.pair import BACKWARD_INPUTS, CHANNELS, GRADIENTS, Forward, compile_pair, parameters
from tests.support import bottleneck

pytestmark = pytest.mark.slow
ANY = pytest.mark.parametrize("mode", [TRAINING, GRAFTING, FULL])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Host(nn.Module):
    """Two layers with a seed between them."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, CHANNELS), nn.Linear(CHANNELS, 3)
        self.runner = runner

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.runner(self.first(x)))


def expected(host: Host, params: list[Tensor], x: Tensor, mode: int, alpha: float) -> list[Tensor]:
    """Result and gradients by eager autograd, from the meaning of each mode."""
    leaves = [p.detach().requires_grad_() for p in params]
    h = host.first(x)
    seed = Forward()(h if mode == FULL else h.detach(), torch.tensor(1.0), *leaves)[0]
    if mode == TRAINING:
        out = host.last(h)
        loss = out.square().sum()
        (at_h,) = torch.autograd.grad(loss, h, retain_graph=True)
        of_params = torch.autograd.grad(seed, leaves, at_h)
        return [out, *torch.autograd.grad(loss, host.first.weight), *of_params]
    out = host.last(h + alpha * (seed - h))
    return [out, *torch.autograd.grad(out.square().sum(), [host.first.weight, *leaves])]


def learnt(host: Host, params: list[Tensor], out: Tensor) -> list[Tensor]:
    for p in [*host.parameters(), *params]:
        p.grad = None
    out.square().sum().backward()
    return [out, host.first.weight.grad, *(p.grad for p in params)]


def close(got: list[Tensor], want: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


@ANY
def test_what_each_mode_means(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    close(learnt(host, params, host(x)), expected(host, params, x, mode, 0.3))


def test_a_seed_that_does_nothing_gives_the_very_tensor(make: Any) -> None:
    runner, h = make(parameters()), torch.randn(3, CHANNELS, requires_grad=True) * 1
    assert runner(h) is h, "until it is set"
    runner.set(0.0, FULL)
    assert runner(h) is h
    runner.set(0.5, TRAINING)
    assert runner(h) is h, "in TRAINING the host goes on with its own tensor"
    with torch.no_grad():
        assert runner(h) is h
    runner.set(0.5, FULL)
    assert runner(h) is not h
    runner.off()
    assert runner(h) is h


def test_in_training_the_host_may_work_in_place(make: Any) -> None:
    params = parameters()
    runner = make(params)
    runner.set(1.0, TRAINING)
    leaf = torch.randn(4, CHANNELS, requires_grad=True)
    h = leaf * 2
    before = h.detach().clone().requires_grad_()
    torch.relu_(runner(h)).square().sum().backward()
    torch.relu(before).square().sum().backward()
    leaves = [p.detach().requires_grad_() for p in params]
    want = torch.autograd.grad(Forward()(before.detach(), torch.tensor(1.0), *leaves)[0], leaves,
                               before.grad)
    close([p.grad for p in params], list(want))


def test_parameters_learn_behind_a_frozen_host(make: Any) -> None:
    params = parameters()
    runner = make(params)
    runner.set(1.0, TRAINING)
    h = torch.randn(4, CHANNELS)
    out = runner(h)
    assert torch.equal(out, h)
    out.sum().backward()
    assert all(p.grad is not None for p in params)


@ANY
def test_frozen_parameters_are_left_as_they_are(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    want = expected(host, params, x, mode, 0.3)
    params[0].requires_grad_(False)
    out, at_host, frozen, *others = learnt(host, params, host(x))
    assert frozen is None
    close([out, at_host, *others], [*want[:2], *want[3:]])
    for p in params:
        p.requires_grad_(False)
    out, at_host, *none = learnt(host, params, host(x))
    assert none == [None] * 4 and not host.runner.failure
    close([out, at_host], want[:2])


@ANY
def test_a_second_derivative_is_the_callers_mistake(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6, requires_grad=True)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(host(x).square().sum(), x, create_graph=True)
    assert not host.runner.failure
    close(learnt(host, params, host(x)), expected(host, params, x, mode, 0.3))


def test_a_failure_stays_in_the_seed(make: Any) -> None:
    runner, h = make(parameters()), torch.randn(3, CHANNELS + 1, requires_grad=True) * 1
    runner.set(0.5, FULL)
    assert not runner.failure
    assert runner(h) is h and runner.failure
    assert runner(torch.randn(3, CHANNELS)).shape == (3, CHANNELS)


def test_a_backward_that_fails_in_training_stays_in_the_seed(make: Any) -> None:
    params = parameters()
    runner, h = make(params), torch.randn(3, CHANNELS, requires_grad=True)
    runner.set(1.0, TRAINING)
    out = runner(h)
    with torch.no_grad():
        params[2].add_(1.0)
    out.sum().backward()
    assert "inplace" in runner.failure
    assert torch.equal(h.grad, torch.ones_like(h))


def test_drift_is_measured_when_asked_for(make: Any) -> None:
    runner, h = make(parameters()), torch.randn(3, CHANNELS)
    runner.set(0.5, FULL)
    runner(h)
    assert runner.take_drift() is None
    runner.ask_for_drift()
    out = runner(h)
    torch.testing.assert_close(runner.take_drift(), ((out - h).norm() / h.norm()).detach())
    assert runner.take_drift() is None


# -- under what torch does around a forward ------------------------------------------------


@ANY
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["amid", "last"])
def test_activation_checkpointing(make: Any, mode: int, reentrant: bool, last: bool) -> None:
    """`last`: nothing is saved after the seed, so a recomputation is stopped inside its call."""
    params, x = parameters(), torch.randn(5, 6, requires_grad=True)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    if last:
        h = checkpoint(lambda x: host.runner(host.first(x)), x, use_reentrant=reentrant)
        out = host.last(h)
    else:
        out = checkpoint(host, x, use_reentrant=reentrant)
    close(learnt(host, params, out), expected(host, params, x, mode, 0.3))
    assert not host.runner.failure


@ANY
def test_autocast(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = host(x)
    assert out.dtype is torch.bfloat16 and not host.runner.failure
    got = learnt(host, params, out.float())
    close(got, expected(host, params, x, mode, 0.3), rtol=0.1, atol=0.3)
    assert all(p.grad.dtype is torch.float32 for p in params)


@ANY
def test_no_grad_and_inference_mode(make: Any, mode: int) -> None:
    runner, h = make(parameters()), torch.randn(5, CHANNELS)
    runner.set(0.3, mode)
    with torch.no_grad():
        want = runner(h)
    with torch.inference_mode():
        assert torch.equal(runner(h.clone()), want)
    runner(h).sum().backward()  # nothing made under inference mode is left for a graph


@ANY
def test_retained_graphs_learn_twice(make: Any, mode: int) -> None:
    params, x = parameters(), torch.randn(5, 6)
    host = Host(make(params))
    host.runner.set(0.3, mode)
    out = host(x).square().sum()
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in params]
    out.backward()
    close([p.grad for p in params], [2 * g for g in once])
    assert not host.runner.failure


@pytest.mark.parametrize("mode", [GRAFTING, FULL])
def test_saved_inputs_are_the_inputs_themselves(make: Any, mode: int) -> None:
    """And hooks on saved tensors see them: this one counts, and moves them away and back."""
    params, h = parameters(), torch.randn(5, CHANNELS, requires_grad=True)
    runner = make(params)
    runner.set(0.3, mode)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.data_ptr())
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        out = runner(h)
    assert {h.data_ptr(), params[0].data_ptr(), params[2].data_ptr()} <= set(seen)
    out.square().sum().backward()
    got = [p.grad for p in params]
    for p in params:
        p.grad = None
    runner(h).square().sum().backward()
    close(got, [p.grad for p in params])


def test_the_copy_of_training_is_written_again_once_it_is_free() -> None:
    extension: Any = native.extension()
    kernel = extension.SeedKernel(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)
    params = parameters()
    runner = extension.RunningSeed(kernel, params)
    runner.set(1.0, TRAINING)
    leaf = torch.randn(4, CHANNELS, requires_grad=True)
    runner(leaf * 1).sum().backward()

    def allocated(h: Tensor) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            runner(h)
        return sum(e.name == "aten::empty" for e in seen.events())

    assert allocated(leaf * 1) == 0, "the copy of a backward that has run"
    kept = runner(leaf * 1).sum()
    assert allocated(leaf * 1) == 1, "not that of one that may still run"
    kept.backward()
    assert allocated(leaf * 1) == 0


def test_threads(make: Any) -> None:
    """Four threads on one seed: every result is right, and no gradient is lost."""
    params = parameters()
    runner = make(params)
    runner.set(1.0, FULL)
    inputs = [torch.randn(5, CHANNELS) for _ in range(4)]
    for h in inputs:
        runner(h).sum().backward()
    want = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    failures: list[BaseException] = []

    def work(h: Tensor) -> None:
        try:
            for _ in range(25):
                runner(h).sum().backward()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(h,)) for h in inputs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    close([p.grad for p in params], [25 * g for g in want], rtol=1e-3, atol=1e-3)


class Batches(torch.utils.data.Dataset[Tensor]):
    """Every item is computed by a grown model, in whatever process asks."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.host(torch.full((1, 6), float(index)))[0]


def test_workers_fork_from_a_grown_model_and_call_it(make: Any) -> None:
    params = parameters()
    host = Host(make(params))
    host.runner.set(0.3, FULL)
    data = Batches(host)
    want = torch.stack([data[i] for i in range(8)])
    host(torch.randn(4, 6)).sum().backward()  # threads of autograd are there when workers fork
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2,
                                         multiprocessing_context="fork")
    for _ in range(2):
        got = []
        for batch in loader:
            got.append(batch)
            host(torch.randn(4, 6)).sum().backward()  # and the parent trains on meanwhile
        torch.testing.assert_close(torch.cat(got), want)


def test_channels_last_hosts_go_on_in_their_order(tmp_path: Path) -> None:
    """A real kernel for images, both as a hook in an eager host and behind a slot."""
    from esper.kasmina.artifact import open_artifact
    from esper.tezzeret.compile import compile_artifact

    signature = SiteSignature(kind=SiteKind.MAP, channels=8)
    ir = bottleneck(SiteKind.MAP)
    content = compile_artifact(ir, signature, pipeline=Pipeline.FAST)
    (tmp_path / "kernel").write_bytes(content)
    opened = open_artifact(tmp_path / "kernel", hashlib.sha256(content).hexdigest(), signature)
    params = [torch.randn_like(p, requires_grad=True) for p in initial_parameters(ir, signature)]
    extension: Any = native.extension()
    runner = extension.RunningSeed(opened.kernel, params)
    runner.set(0.5, FULL)
    slot = Slot(Found("site", nn.Identity(), signature, 1))
    slot._native.set_seeds([runner])
    x = torch.randn(2, 8, 6, 5)
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        for call in (runner, lambda h: torch.ops.esper.slot(h, None, slot.number)):
            h = x.clone(memory_format=order).requires_grad_()
            out = call(h)
            assert out.is_contiguous(memory_format=order)
            with torch.no_grad():
                assert call(h).is_contiguous(memory_format=order)
            for p in params:
                p.grad = None
            out.square().sum().backward()
            results.append([out, h.grad, *(p.grad for p in params)])
    for other in results[1:]:
        close(other, results[0])
    slot.close()


def test_a_parameter_that_is_no_leaf_is_refused() -> None:
    extension: Any = native.extension()
    kernel = extension.SeedKernel(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)
    with pytest.raises(ValueError, match="result of an operation"):
        extension.RunningSeed(kernel, [p * 1 for p in parameters()])
