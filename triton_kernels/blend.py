"""The fused blend in Triton: `out = h + alpha * (s - h)`, both gradients in one pass.

For NVIDIA GPUs without esper's CUDA build. Sums are formed in float32 (float64 for float64),
whatever the tensors' type.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def blend_forward(
    h_ptr, s_ptr, out_ptr, alpha_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    # 64 bits before the product: activations of more than 2^31 elements exist.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    op = tl.float64 if WIDE else tl.float32
    h = tl.load(h_ptr + i, mask=inside).to(op)
    s = tl.load(s_ptr + i, mask=inside).to(op)
    out = h + tl.load(alpha_ptr).to(op) * (s - h)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def blend_backward(
    g_ptr, g_h_ptr, g_s_ptr, alpha_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    op = tl.float64 if WIDE else tl.float32
    alpha = tl.load(alpha_ptr).to(op)
    g = tl.load(g_ptr + i, mask=inside).to(op)
    tl.store(g_h_ptr + i, ((1 - alpha) * g).to(g_h_ptr.dtype.element_ty), mask=inside)
    tl.store(g_s_ptr + i, (alpha * g).to(g_s_ptr.dtype.element_ty), mask=inside)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        h, s = h.contiguous(), s.contiguous()
        out, n = torch.empty_like(h), h.numel()
        if n:
            wide = h.dtype == torch.float64
            blend_forward[(triton.cdiv(n, BLOCK),)](h, s, out, alpha, n, WIDE=wide, BLOCK=BLOCK)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (alpha,) = ctx.saved_tensors
        g = g.contiguous()
        g_h, g_s, n = torch.empty_like(g), torch.empty_like(g), g.numel()
        if n:
            wide = g.dtype == torch.float64
            blend_backward[(triton.cdiv(n, BLOCK),)](
                g, g_h, g_s, alpha, n, WIDE=wide, BLOCK=BLOCK
            )
        return g_h, g_s, None


def blend(h: Tensor, s: Tensor, alpha: float) -> Tensor:
    """`h + alpha * (s - h)`; at alpha = 0 and 1 the very tensor `h` or `s`.

    Raises:
        ValueError: the tensors differ in shape, type or device, or alpha is out of range.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be within 0 and 1")
    if h.shape != s.shape or h.dtype != s.dtype or h.device != s.device:
        raise ValueError(
            f"blend was given h of {list(h.shape)} {h.dtype} on {h.device} and s of "
            f"{list(s.shape)} {s.dtype} on {s.device}; both must have the same shape, type and "
            "device"
        )
    if alpha in (0.0, 1.0):
        return s if alpha else h
    # A tensor, not a number: a number is passed in float32 even where the tensors are float64.
    out: Tensor = _Blend.apply(h, s, torch.tensor(alpha, dtype=torch.float64, device=h.device))
    return out
