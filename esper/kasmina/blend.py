"""Blending a seed's output into its host's: one pass over memory where the extension is there."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kasmina.native import extension


def blend(h: Tensor, s: Tensor, alpha: float) -> Tensor:
    """`h + alpha * (s - h)`, with gradients `(1 - alpha) * g` for h and `alpha * g` for s.

    At alpha = 0 and 1 the very tensor `h` or `s` is returned: what is blended out has no
    influence, not even where it is inf or NaN, and gets no gradient.

    Args:
        h: output of the host, floating point, any shape.
        s: output of the seed, of the same shape, type and device.
        alpha: within 0 and 1.

    Raises:
        ValueError: the tensors do not agree, or alpha is out of range.
    """
    native = extension()
    if native is not None:
        out: Tensor = native.blend(h, s, alpha)
        return out
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be within 0 and 1")
    if h.shape != s.shape or h.dtype != s.dtype or h.device != s.device:
        raise ValueError(
            f"blend was given h of {list(h.shape)} {h.dtype} on {h.device} and s of "
            f"{list(s.shape)} {s.dtype} on {s.device}; both must have the same shape, type and "
            "device"
        )
    if not h.is_floating_point():
        raise ValueError(f"blend was given {h.dtype}; it needs a floating point type")
    if alpha in (0.0, 1.0):
        return s if alpha else h
    return torch.lerp(h, s, alpha)
