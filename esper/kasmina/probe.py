"""Probing: one forward pass of a model, to see what each of its modules returns.

It runs in eval mode under no_grad with the random state kept, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.output import first_tensor, parts_of
from esper.kasmina.rng import rng_state, set_rng_state

# Layers that give [B, C, L], which is no kind of site.
_CHANNELS_FIRST_1D = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d)


@dataclass(frozen=True)
class Seen:
    """One call of a module: its output's first tensor.

    `layout` names one that no kernel is made for ("[B, H, W, C]"), and is empty otherwise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    keeps_shape: bool
    layout: str


@dataclass
class Record:
    """What a forward pass did with one module. `seen` has an entry for each call that returned a
    float tensor."""

    calls: int = 0
    seen: list[Seen] = field(default_factory=list)
    is_result: bool = False


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no_grad inside; training flags and random states as before afterwards."""
    modes = {m: m.training for m in model.modules()}
    random_state = rng_state()
    with torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            set_rng_state(random_state)
            for module, mode in modes.items():
                module.training = mode


def call(model: nn.Module, example: Any) -> Any:
    """The model on one batch: a tuple is positional arguments, a mapping is named ones."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def batch_size(example: Any) -> int:
    """The first extent of the first tensor of a batch; 0 where there is none."""
    given = [example] if isinstance(example, Tensor) else [p for _, p in parts_of(example)]
    return next((t.shape[0] for t in given if isinstance(t, Tensor) and t.ndim), 0)


def is_leaf(module: nn.Module) -> bool:
    """Whether it holds no other modules; those that compute its weights do not count."""
    return all(name == "parametrizations" for name, _ in module.named_children())


class _Layout:
    """Follows which layout the tensors of a forward pass are in.

    A shape says nothing of its axes' meaning, the layer that made it does; it holds for the
    modules around that layer, and for activations after it, while the shape stays the same.
    """

    def __init__(self) -> None:
        self._last: tuple[str, tuple[int, ...]] = "", ()

    def after(self, module: nn.Module, shape: tuple[int, ...]) -> str:
        own = ""
        if isinstance(module, _CHANNELS_FIRST_1D) and len(shape) == 3:
            own = "[B, C, L]"
        elif len(shape) == 4 and shape[-1] == _width(module):
            own = "[B, H, W, C]"
        if own or (is_leaf(module) and next(module.parameters(), None) is not None):
            self._last = own, shape
        # A class derived from LayerNorm may turn its axes back; so may the code of a block.
        certain = type(module) in (nn.Linear, nn.LayerNorm) or isinstance(
            module, _CHANNELS_FIRST_1D)
        layout, made = self._last
        return layout if layout and made == shape and (certain or shape[1] != shape[-1]) else ""


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None


def probe(model: nn.Module, example: Any) -> dict[str, Record]:
    """A record for each module, by the first of its names."""
    records = {name: Record() for name, _ in model.named_modules()}
    tensors: dict[str, Tensor] = {}
    layout, handles = _Layout(), []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record, tensor = records[name], first_tensor(output)
            record.calls += 1
            if tensor is not None and tensor.is_floating_point():
                shape = tuple(tensor.shape)
                given = first_tensor(args[0]) if args else None
                tensors[name] = tensor
                record.seen.append(Seen(
                    shape, tensor.dtype, tensor.device.type,
                    keeps_shape=given is not None and given.shape == tensor.shape,
                    layout=layout.after(module, shape),
                ))

        return hook

    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            handles.append(module.register_forward_hook(watch(name)))
        with undisturbed(model):
            result = first_tensor(call(model, example))
    finally:
        for handle in handles:
            handle.remove()
    for name, tensor in tensors.items():
        records[name].is_result = tensor is result
    return records
