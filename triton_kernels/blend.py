"""The fused blend in Triton: `out = h + alpha * (s - h)`, both gradients in one pass.

For NVIDIA GPUs without esper's CUDA build. Sums are formed in float32 (float64 for float64),
whatever the tensors' type.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.triton_kernels.launch import on_device_of

BLOCK = 1024


# alpha comes as the bits of a float64: Triton passes numbers of Python in float32, and a tensor
# would have to be copied to the device, which waits for it. Not specialised: it changes at
# every step, and would be compiled for multiples of 16 and for others.
@triton.jit(do_not_specialize=["alpha_bits"])
def blend_forward(  # type: ignore[no-untyped-def]
    h_ptr, s_ptr, out_ptr, alpha_bits, n, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    # 64 bits before the product: activations of more than 2^31 elements exist.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    op = tl.float64 if WIDE else tl.float32
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True).to(op)
    h = tl.load(h_ptr + i, mask=inside).to(op)
    s = tl.load(s_ptr + i, mask=inside).to(op)
    # From the nearer end, as torch.lerp does it: exact at both ends.
    out = tl.where(alpha < 0.5, h + alpha * (s - h), s + (alpha - 1) * (s - h))
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["alpha_bits"])
def blend_backward(  # type: ignore[no-untyped-def]
    g_ptr, g_h_ptr, g_s_ptr, alpha_bits, n, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    op = tl.float64 if WIDE else tl.float32
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    g = tl.load(g_ptr + i, mask=inside).to(op)
    g_h = (1 - alpha).to(op) * g
    tl.store(g_h_ptr + i, g_h.to(g_h_ptr.dtype.element_ty), mask=inside)
    tl.store(g_s_ptr + i, (alpha.to(op) * g).to(g_s_ptr.dtype.element_ty), mask=inside)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        h, s = h.contiguous(), s.contiguous()
        out, n = torch.empty_like(h), h.numel()
        if n:
            with on_device_of(h):
                blend_forward[(triton.cdiv(n, BLOCK),)](
                    h, s, out, _bits(alpha), n, WIDE=h.dtype == torch.float64, BLOCK=BLOCK
                )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = grads
        if torch.is_grad_enabled():  # somebody will differentiate the gradients
            return g * (1 - ctx.alpha), g * ctx.alpha, None
        g = g.contiguous()
        g_h, g_s, n = torch.empty_like(g), torch.empty_like(g), g.numel()
        if n:
            with on_device_of(g):
                blend_backward[(triton.cdiv(n, BLOCK),)](
                    g, g_h, g_s, _bits(ctx.alpha), n, WIDE=g.dtype == torch.float64, BLOCK=BLOCK
                )
        return g_h, g_s, None


def _bits(alpha: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", alpha))[0]
    return bits


def blend(h: Tensor, s: Tensor, alpha: float) -> Tensor:
    """`h + alpha * (s - h)`; at alpha = 0 and 1 the very tensor `h` or `s`.

    Strided inputs are copied first.

    Raises:
        ValueError: the tensors differ in shape, type or device, or are not floating point; or
            alpha is out of range.
    """
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
    out: Tensor = _Blend.apply(h, s, alpha)
    return out
