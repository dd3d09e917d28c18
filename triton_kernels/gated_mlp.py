"""The gated MLP (SwiGLU, Shazeer 2020) in Triton.

`y = (silu(x Wg' + bg) * (x Wu' + bu)) Wd' + bd`. Both products with x, SiLU and the gating are
one kernel: x is read once and neither product visits memory again in the forward. The product
with Wd, and those of the backward, are plain ones and stay with torch; the elementwise part of
the backward is one kernel. Tile sizes were never tuned on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from esper.triton_kernels.launch import add_product, check_linear, on_device_of, precision_of

ROWS, COLUMNS, INNER = 64, 64, 32
BLOCK = 1024


@triton.jit
def gate_forward(  # type: ignore[no-untyped-def]
    x_ptr, wg_ptr, bg_ptr, wu_ptr, bu_ptr, hidden_ptr, gate_ptr, up_ptr, rows, channels, width,
    HAS_BG: tl.constexpr, HAS_BU: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):
    # One tile of the hidden layer. All matrices are contiguous: x [rows, channels], the weights
    # [width, channels], what is stored [rows, width].
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    in_m, in_n = m < rows, n < width
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, channels, INNER):
        in_k = start + k < channels
        x = tl.load(x_ptr + m[:, None] * channels + (start + k)[None, :],
                    mask=in_m[:, None] & in_k[None, :], other=0.0)
        at = n[None, :] * channels + (start + k)[:, None]
        inside = in_k[:, None] & in_n[None, :]
        wg = tl.load(wg_ptr + at, mask=inside, other=0.0)
        wu = tl.load(wu_ptr + at, mask=inside, other=0.0)
        gate = add_product(gate, x, wg, PRECISION)
        up = add_product(up, x, wu, PRECISION)
    if HAS_BG:
        gate += tl.load(bg_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BU:
        up += tl.load(bu_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    hidden = gate * tl.sigmoid(gate) * up
    at = m[:, None] * width + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    to = hidden_ptr.dtype.element_ty
    tl.store(hidden_ptr + at, hidden.to(to), mask=inside)
    if SAVE:
        tl.store(gate_ptr + at, gate.to(to), mask=inside)
        tl.store(up_ptr + at, up.to(to), mask=inside)


@triton.jit
def gate_backward(  # type: ignore[no-untyped-def]
    grad_ptr, gate_ptr, up_ptr, g_gate_ptr, g_up_ptr, n, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # d silu(z)/dz = sigmoid(z) (1 + z (1 - sigmoid(z)))
    g_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    to = g_gate_ptr.dtype.element_ty
    tl.store(g_gate_ptr + i, g_gate.to(to), mask=inside)
    tl.store(g_up_ptr + i, (grad * silu).to(to), mask=inside)


class _Gate(torch.autograd.Function):
    """silu(x Wg' + bg) * (x Wu' + bu) for x of [rows, channels]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wg: Tensor, bg: Tensor | None, wu: Tensor, bu: Tensor | None
    ) -> Tensor:
        x, wg, wu = x.contiguous(), wg.contiguous(), wu.contiguous()
        (rows, channels), width = x.shape, wg.shape[0]
        save = any(ctx.needs_input_grad)
        hidden = x.new_empty(rows, width)
        gate, up = (x.new_empty(rows, width) if save else hidden for _ in range(2))
        if hidden.numel():
            with on_device_of(x):
                grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
                gate_forward[grid](
                    x, wg, x if bg is None else bg.contiguous(),
                    wu, x if bu is None else bu.contiguous(), hidden, gate, up,
                    rows, channels, width, HAS_BG=bg is not None, HAS_BU=bu is not None,
                    SAVE=save, PRECISION=precision_of(x),
                    ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER,
                )
        ctx.save_for_backward(x, wg, wu, gate, up)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, wg, wu, gate, up = ctx.saved_tensors
        grad = grads[0].contiguous()
        g_gate, g_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        if n:
            with on_device_of(grad):
                gate_backward[(triton.cdiv(n, BLOCK),)](
                    grad, gate, up, g_gate, g_up, n, BLOCK=BLOCK
                )
        for_x, for_wg, for_bg, for_wu, for_bu = ctx.needs_input_grad
        return (
            torch.addmm(g_gate @ wg, g_up, wu) if for_x else None,
            g_gate.mT @ x if for_wg else None,
            g_gate.sum(0) if for_bg else None,
            g_up.mT @ x if for_wu else None,
            g_up.sum(0) if for_bu else None,
        )


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
) -> Tensor:
    """`(silu(x w_gate' + b_gate) * (x w_up' + b_up)) w_down' + b_down`.

    What Karn's template `gated` does between its norm and its residual, which are the caller's.
    No second derivative.

    Args:
        x: [..., C], of float32, bfloat16 or float16; sums are formed in float32, and in TF32
            only where `torch.backends.cuda.matmul.allow_tf32` says so.
        w_gate, w_up: [H, C], as `nn.Linear` has them; b_gate, b_up: [H] or None.
        w_down: [C', H]; b_down: [C'] or None.

    Returns:
        [..., C'], of the type of x.

    Raises:
        ValueError: shapes, element types or devices do not agree.
    """
    check_linear("gated_mlp", x, w_gate, b_gate)
    check_linear("gated_mlp", x, w_up, b_up)
    if w_gate.shape != w_up.shape:
        raise ValueError(
            f"gated_mlp was given w_gate of {list(w_gate.shape)} and w_up of "
            f"{list(w_up.shape)}; they must be alike"
        )
    hidden: Tensor = _Gate.apply(x.flatten(0, -2) if x.ndim > 1 else x[None],
                                 w_gate, b_gate, w_up, b_up)
    check_linear("gated_mlp", hidden, w_down, b_down)
    return linear(hidden, w_down, b_down).reshape(*x.shape[:-1], w_down.shape[0])
