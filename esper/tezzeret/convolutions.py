"""Convolutions as operations that the compiler can fuse, instead of calls it cannot look into.

ATen's convolutions run in oneDNN, which lays its operands out anew in every call, and what
surrounds them stays outside. A 1x1 convolution is a matrix product; one per channel is a short
sum of shifted products, one term for each tap of its window. Spelled out so, the first needs no
other layout and the second becomes loops that take norms, activations and the blend in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Each tap is one more read of the input, and more code; a window with more stays a call.
MOST_TAPS = 9

_ATEN = torch.ops.aten


def _is_product(weight: Tensor, padding: Sequence[int], groups: int) -> bool:
    return groups == 1 and prod(weight.shape[2:]) == 1 and not any(padding)


def _is_per_channel(x: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == x.shape[1] == weight.shape[0] and prod(weight.shape[2:]) <= MOST_TAPS


def _shifted(x: Tensor, places: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """`x` [B, C, *] from `places` on, `sizes` long, along its positions."""
    for axis, (place, size) in enumerate(zip(places, sizes, strict=True), start=2):
        x = x.narrow(axis, place, size)
    return x


def _padded(x: Tensor, by: Sequence[int]) -> Tensor:
    return F.pad(x, [n for side in reversed(by) for n in (side, side)]) if any(by) else x


def _per_channel(weight: Tensor, tap: tuple[int, ...]) -> Tensor:
    place: Any = (slice(None), 0, *tap)
    return weight[place].view(1, -1, *(1 for _ in tap))


def _taps(weight: Tensor) -> list[tuple[int, ...]]:
    return list(product(*(range(n) for n in weight.shape[2:])))


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> Any:
    if _is_product(weight, padding, groups):
        matrix = weight.flatten(1)
        out = torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2))
        out = out.view(x.shape[0], -1, *x.shape[2:])
    elif _is_per_channel(x, weight, groups):
        wide = _padded(x, padding)
        sizes = [w - k + 1 for w, k in zip(wide.shape[2:], weight.shape[2:], strict=True)]
        terms = [_shifted(wide, tap, sizes) * _per_channel(weight, tap) for tap in _taps(weight)]
        out = sum(terms[1:], terms[0])
    else:
        return NotImplemented
    return out if bias is None else out + bias.view(1, -1, *(1 for _ in x.shape[2:]))


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, wanted: Sequence[bool],
) -> Any:
    positions = [0, *range(2, x.dim())]
    g_bias = grad.sum(positions) if wanted[2] else None
    if _is_product(weight, padding, groups):
        matrix, g = weight.flatten(1), grad.flatten(2)
        g_x = torch.bmm(matrix.t().expand(x.shape[0], -1, -1), g).view_as(x)
        g_weight = torch.bmm(g, x.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
    elif _is_per_channel(x, weight, groups):
        window = weight.shape[2:]
        # The mirror of the forward: position y of x went to y + padding - tap.
        wide = _padded(grad, [k - 1 - p for k, p in zip(window, padding, strict=True)])
        g_terms = [
            _shifted(wide, [k - 1 - t for k, t in zip(window, tap, strict=True)], x.shape[2:])
            * _per_channel(weight, tap) for tap in _taps(weight)
        ]
        g_x = sum(g_terms[1:], g_terms[0])
        there = _padded(x, padding)
        sums = [(_shifted(there, tap, grad.shape[2:]) * grad).sum(positions)
                for tap in _taps(weight)]
        g_weight = torch.stack(sums, 1).view_as(weight)
    else:
        return NotImplemented
    return (g_x if wanted[0] else None, g_weight if wanted[1] else None, g_bias)


SPELLED_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.convolution.default: _convolution,
    _ATEN.convolution_backward.default: _convolution_backward,
}
