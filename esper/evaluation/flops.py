"""Floating-point operations, by one counter for every arm.

torch's own counter, `FlopCounterMode`, which counts matrix products, convolutions and attention
and leaves elementwise operations out, for everybody. On two points it is put right:

- it does not know attention as it runs on a CPU, and would count none;
- it counts the weight's gradient of a grouped convolution as if there were one group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.reference import function, initial_parameters
from esper.leyline.signature import SiteSignature
from esper.tolaria.scores import LossFn

aten = torch.ops.aten
_GROUPS, _MASK = 9, 10  # among the arguments of convolution_backward


Formula = Callable[..., int]


def _raw(formula: Formula) -> Formula:
    """Torch calls it with the operator's arguments as they are, and `out_val`."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@_raw
def _convolution_backward(*args: Any, **kwargs: Any) -> int:
    total, given = 0, list(args)
    for wanted, parts in ((0, 1), (1, args[_GROUPS])):  # gradients of the input, of the weight
        given[_MASK] = [asked and i == wanted for i, asked in enumerate(args[_MASK])]
        total += flop_registry[aten.convolution_backward](*given, **kwargs) // parts
    return total


def _as(operator: Any) -> Formula:
    return _raw(lambda *args, **kwargs: flop_registry[operator](*args, **kwargs))


_MENDED = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu:
        _as(aten._scaled_dot_product_flash_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        _as(aten._scaled_dot_product_flash_attention_backward),
}


def counter() -> FlopCounterMode:
    """Counts what is run inside it, on this thread; see `get_total_flops`."""
    return FlopCounterMode(display=False, custom_mapping=_MENDED)


@dataclass(frozen=True)
class Cost:
    """FLOPs for one batch of `samples`: without gradients, and with a backward pass too."""

    samples: int
    forward: int
    both: int

    def of(self, samples: int, learning: bool) -> int:
        """For a batch of another size. All that is counted grows with the samples."""
        return round((self.both if learning else self.forward) * samples / self.samples)


def cost_of(model: nn.Module, loss_fn: LossFn, batch: Sequence[Tensor]) -> Cost:
    """What a batch costs in `model`, which is left as it is: a copy is run.

    In training mode in both cases: layers that torch fuses for inference (TransformerEncoderLayer)
    would be counted as nothing.
    """
    twin = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad(), counter() as forward:
            loss_fn(twin, batch)
        with torch.enable_grad(), counter() as both:
            loss_fn(twin, batch).backward()
    return Cost(len(batch[0]), forward.get_total_flops(), both.get_total_flops())


def seed_cost(ir: BlueprintIR, signature: SiteSignature, shape: Sequence[int]) -> Cost:
    """What one call of a blueprint's kernel costs on a tensor of `shape`, counted on its plain
    form. A compiled backward gives all gradients, whoever needs them, so all are counted."""
    run = function(ir, signature)
    generator = torch.Generator().manual_seed(0)
    params = [p.requires_grad_() for p in initial_parameters(ir, signature, generator=generator)]
    h = torch.zeros(tuple(shape), dtype=getattr(torch, signature.dtype))
    with torch.no_grad(), counter() as forward:
        run(h, params)
    with torch.enable_grad(), counter() as both:
        run(h.requires_grad_(), params).sum().backward()
    return Cost(shape[0], forward.get_total_flops(), both.get_total_flops())
