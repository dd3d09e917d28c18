"""The swap of `forward`, with kernels in plain torch: what a compiled kernel computes is tested
in test_accelerate; here it is when one runs, and that nothing else of a module changes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper.nn.fast import Fast, fast_of, plain_forward
from esper.nn.trace import match
from tests.support import plain_kernel


class Counting:
    """A kernel in plain torch that counts its calls."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        found = match(module, example)
        self._kernel = plain_kernel(found.ir, found.signature)
        self.calls = 0
        module.__dict__["forward"] = Fast(
            module, self, found.signature, [(w.path, w.shape) for w in found.weights],
            rank=example.dim(), flat=found.flat, only_eval=found.only_eval, name="kernel k-1",
        )

    def __call__(self, h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        assert h.is_contiguous() and (alpha, mode) == (1.0, 2)
        self.calls += 1
        return self._kernel(h, params, alpha, mode)


def mlp(*inside: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), *inside, nn.Linear(12, 8))


X = torch.randn(3, 8)


def test_the_kernel_runs_and_learns_as_the_module_does() -> None:
    torch.manual_seed(0)
    fast = mlp()
    twin = copy.deepcopy(fast)
    kernel = Counting(fast, X)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (fast, twin)]
    for _ in range(5):
        for m, optimizer in zip((fast, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().sum().backward()
            optimizer.step()
    assert kernel.calls == 5
    for ours, theirs in zip(fast.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert not fast(X).requires_grad
    assert kernel.calls == 6


def autocast(m: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m(X)


def plain(m: nn.Module) -> Tensor:
    with esper.nn.plain():
        return m(X)


def counted(m: nn.Module) -> Tensor:
    with FlopCounterMode(display=False) as flops:
        out = m(X)
    assert flops.get_total_flops() == 2 * 2 * 3 * 8 * 12
    return out


def dual(m: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        out = m(forward_ad.make_dual(X, torch.ones_like(X)))
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return forward_ad.unpack_dual(out).primal


def second_derivative(m: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    with esper.nn.plain():
        (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    g.sum().backward()
    return g


def functional(m: nn.Module) -> Tensor:
    params = {k: v.detach() for k, v in m.named_parameters()}
    return torch.func.grad(
        lambda p: torch.func.functional_call(m, p, X).sum())(params)["0.weight"]


PLAIN: dict[str, Callable[[nn.Module], Tensor]] = {
    "autocast": autocast,
    "esper.nn.plain": plain,
    "a dispatch mode": counted,
    "forward-mode derivatives": dual,
    "second derivatives inside plain": second_derivative,
    "torch.func.grad": functional,
    "torch.func.vmap": torch.func.vmap,
    "another type": lambda m: m.double()(X.double()),
    "another rank": lambda m: m(torch.randn(2, 3, 8)),
    "not contiguous": lambda m: m(torch.randn(8, 3).T),
    "no rows": lambda m: m(torch.empty(0, 8)),
    "a keyword": lambda m: m(input=X),
    "torch.compile": lambda m: torch.compile(m, backend="eager", fullgraph=True)(X),
    "torch.export": lambda m: torch.export.export(m, (X,)).module()(X),
    "meta": lambda m: m.to("meta")(X.to("meta")),
}
PLAIN["torch.func.vmap"] = lambda m: torch.func.vmap(m)(torch.randn(2, 3, 8))


@pytest.mark.parametrize("name", PLAIN)
def test_calls_that_do_not_fit_run_the_plain_forward(name: str) -> None:
    torch.manual_seed(0)
    fast = mlp()
    twin = copy.deepcopy(fast)
    kernel = Counting(fast, X)
    torch.manual_seed(1)
    ours = PLAIN[name](fast)
    torch.manual_seed(1)
    theirs = PLAIN[name](twin)
    assert kernel.calls == 0
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if not ours.is_meta:
        torch.testing.assert_close(ours, theirs)


def test_path_says_which_one_runs_and_why() -> None:
    module = mlp()
    assert esper.nn.path(module) == esper.nn.path(module, X) == "plain"
    Counting(module, X)
    assert esper.nn.path(module) == esper.nn.path(module, X) == "kernel k-1"
    assert esper.nn.path(module, X.double()) == "plain: its input is torch.float64"
    with torch.autocast("cpu"):
        assert esper.nn.path(module, X) == "plain: it is under autocast"
    block = esper.nn.Bottleneck(8, 4)
    assert "path: plain" in repr(block)
    Counting(block, X)
    assert block.path == "kernel k-1" and "path: kernel k-1" in repr(block)


def test_structure_that_changed_since_is_noticed() -> None:
    module = mlp()
    kernel = Counting(module, X)
    module(X)
    handle = module[0].register_forward_hook(lambda m, a, out: 2 * out)
    plain_out = plain_forward(module)(X)
    assert torch.equal(module(X), plain_out) and kernel.calls == 1
    handle.remove()
    module(X)
    assert kernel.calls == 2
    module[1] = nn.ReLU()
    assert torch.equal(module(X), plain_forward(module)(X)) and kernel.calls == 2
    assert "replaced" in esper.nn.path(module, X)


def test_replaced_parameters_are_the_ones_used() -> None:
    module = mlp()
    kernel = Counting(module, X)
    module(X)
    module[0].weight = nn.Parameter(torch.zeros(12, 8))
    torch.testing.assert_close(module(X), plain_forward(module)(X))
    assert kernel.calls == 2


@pytest.mark.parametrize("called_before", [True, False])
def test_parameters_of_another_shape_are_not_given_to_the_kernel(called_before: bool) -> None:
    module = mlp()
    kernel = Counting(module, X)
    if called_before:
        module(X)
    for m in (module, copy.deepcopy(module)):
        # Still a model that fits together, but narrower than what the kernel reads.
        m[0].weight, m[0].bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        m[2].weight = nn.Parameter(torch.randn(8, 6))
        assert torch.equal(m(X), plain_forward(m)(X)) and kernel.calls == called_before
        assert "was shaped [12, 8] and is shaped [6, 8] now" in esper.nn.path(m, X)
    with torch.no_grad():
        wide = mlp()
        kernel = Counting(wide, X)
        wide[0].weight.set_(torch.randn(6, 8))  # in place, in the very same Parameter
        assert "is shaped [6, 8] now" in esper.nn.path(wide, X)


def test_dropout_is_plain_in_training_only() -> None:
    module = mlp(nn.Dropout(0.5))
    kernel = Counting(module, X)
    module(X)
    assert kernel.calls == 0
    module.eval()(X)
    assert kernel.calls == 1
    module[2].train()  # left on by hand, as Monte Carlo dropout does
    module(X)
    assert kernel.calls == 1 and "dropout of 0.5" in esper.nn.path(module, X)


def test_state_and_hooks_are_the_modules_own() -> None:
    module = mlp()
    keys, parameters = list(module.state_dict()), list(module.parameters())
    seen: list[Any] = []
    module.register_forward_hook(lambda m, a, out: seen.append(out))
    kernel = Counting(module, X)
    out = module(X)
    assert seen == [out] and kernel.calls == 1
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    twin = mlp()
    twin.load_state_dict(module.state_dict())
    module.load_state_dict(mlp().state_dict())
    assert not torch.equal(module(X), twin(X))


def test_copies_are_accelerated_and_independent() -> None:
    module = nn.Sequential(mlp(), nn.Linear(8, 2))
    kernel = Counting(module[0], X)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert fast_of(twin[0]) is not fast_of(module[0])
    assert not twin(X).any() and module(X).any() and kernel.calls == 2
    esper.nn.undo(module)
    twin(X)
    assert kernel.calls == 3


def test_a_model_that_is_saved_whole_arrives_plain() -> None:
    module = nn.Sequential(mlp())
    Counting(module[0], X)
    again = pickle.load(io.BytesIO(pickle.dumps(module)))
    assert esper.nn.path(again[0]) == "plain"
    assert torch.equal(again(X), plain_forward(module[0])(X))
    copy.deepcopy(again)


def test_undo_gives_the_very_module_back() -> None:
    module = mlp()
    before = dict(module.__dict__)
    Counting(module, X)
    assert esper.nn.undo(module) is module and module.__dict__ == before

    own = module.__dict__["forward"] = lambda x: x  # somebody else's patch
    found = match(mlp(), X)
    module.__dict__["forward"] = Fast(
        module, lambda *a: X, found.signature, [(w.path, w.shape) for w in found.weights],
        rank=2, flat=False, only_eval="", name="kernel k-2")
    esper.nn.undo(module)
    assert module.__dict__["forward"] is own


def test_the_signature_stays_what_it_was() -> None:
    module = mlp()
    before = inspect.signature(module.forward)
    Counting(module, X)
    assert inspect.signature(module.forward) == before


def test_any_rank_is_folded_into_the_batch() -> None:
    module, x = mlp(), torch.randn(2, 3, 4, 8)
    twin = copy.deepcopy(module)
    kernel = Counting(module, x)
    torch.testing.assert_close(module(x), twin(x))
    assert kernel.calls == 1
