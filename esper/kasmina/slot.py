"""Slots: sites of a host that torch.compile has traced, or will.

A compiled graph cannot be given a hook later. So each site gets one when the model is wrapped: a
call of the operator `esper::slot` with the slot's number. The graph holds the operator and the
number; which seeds are behind the number is looked up when it runs, so they come and go without a
compilation.

The compiler sees one operator from h to a tensor like h. The seeds' parameters are no inputs of
it: their gradients are added to `.grad` by its backward, where optimizers find them, and where
`torch.autograd.grad` does not.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.errors import SiteError
from esper.kasmina.native import extension
from esper.kasmina.output import first_tensor, with_tensor
from esper.kasmina.seed import Seed
from esper.kasmina.sites import Found


class Slot:
    """The hook on one site, and the seeds behind it in their order.

    Raises:
        SiteError: the extension is not there. A host is compiled for speed, and an operator in
            Python would take that away again at every site.
    """

    def __init__(self, found: Found) -> None:
        native = extension()
        if native is None:
            raise SiteError(
                "a compiled model grows through esper's extension, which is not there "
                "(`esper doctor` says why); build it, or wrap the model without compiling it"
            )
        _tell_compiler()
        self._native = native.Slot()
        self.number: int = self._native.number
        # What needs a gradient where the host needs none: see csrc/ops.cc.
        self.anchor = torch.zeros(0, requires_grad=True)
        self._seeds: list[Seed] = []
        self.handle: Any = found.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = first_tensor(output)
        if h is None:
            return output
        anchor = None if h.requires_grad else self.anchor
        return with_tensor(output, torch.ops.esper.slot(h, anchor, self.number))

    def add(self, seed: Seed) -> None:
        self._show([*self._seeds, seed])

    def remove(self, seed: Seed) -> None:
        self._show([s for s in self._seeds if s is not seed])

    def close(self) -> None:
        """Take the hook off."""
        self.handle.remove()
        self._show([])

    def _show(self, seeds: list[Seed]) -> None:
        self._seeds = seeds
        self._native.set_seeds([s.runner for s in seeds])

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        """A copied model has slots of its own, with copies of the seeds of this moment."""
        other = copy.copy(self)
        memo[id(self)] = other
        other._native = type(self._native)()
        other.number, other.handle = other._native.number, None
        other._show([copy.deepcopy(s, memo) for s in self._seeds])
        return other


def taken_up(module: nn.Module) -> list[Seed]:
    """The seeds that a copied module brought with it, each with a way to leave it again."""
    found: list[Seed] = []
    for key, hook in module._forward_hooks.items():
        owner = getattr(hook, "__self__", None)
        if isinstance(hook, Slot):
            for seed in hook._seeds:
                seed._slot = hook
            found += hook._seeds
        elif isinstance(owner, Seed):
            owner._handle = RemovableHandle(module._forward_hooks)
            owner._handle.id = key
            found.append(owner)
    return found


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(model)` or `model.compile()` made it; neither imports a compiler."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Inside, what torch.compile made runs as it was written, so that any hook is called."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


_told = False


def _tell_compiler() -> None:
    """Shapes, types and devices of the operators' results, once; called when they exist."""
    global _told
    if _told:
        return
    _told = True
    register = torch.library.register_fake

    @register("esper::slot")
    def _(h: Tensor, anchor: Tensor | None, number: int) -> Tensor:
        return torch.empty_like(h)

    @register("esper::slot_forward")
    def _(h: Tensor, number: int, learn: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(h), torch.empty(1, dtype=torch.float64, device="cpu")

    @register("esper::slot_backward")
    def _(grad: Tensor, h: Tensor, ticket: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(grad), torch.empty(0, device="cpu")
