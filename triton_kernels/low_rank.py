"""The low-rank adapter (LoRA, Hu et al. 2021) in Triton: `y = (x Wd') Wu' + b` in one kernel.

The rank is small, so a tile of rows keeps its low-rank code in registers between the two
products. The gradient of x is the same map with both weights transposed, hence the same kernel:
`g_x = (g Wu) Wd`. The gradients of the weights are plain products and stay with torch. Tile
sizes were never tuned on a GPU.
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
MAX_RANK = 128
"""Above this the code of a tile does not fit into registers; two products are then as good."""


@triton.jit
def low_rank_map(  # type: ignore[no-untyped-def]
    x_ptr, down_ptr, up_ptr, bias_ptr, out_ptr, code_ptr, rows, inputs, rank, outputs,
    down_rank, down_input, up_output, up_rank,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):
    # `down` is [rank, inputs] and `up` [outputs, rank], of any strides; x, out and code are
    # contiguous. RANK is rank, rounded up to what tl.dot takes.
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    k = tl.arange(0, INNER)
    in_m, in_r = m < rows, r < rank
    code = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, inputs, INNER):
        in_k = start + k < inputs
        x = tl.load(x_ptr + m[:, None] * inputs + (start + k)[None, :],
                    mask=in_m[:, None] & in_k[None, :], other=0.0)
        down = tl.load(down_ptr + r[None, :] * down_rank + (start + k)[:, None] * down_input,
                       mask=in_k[:, None] & in_r[None, :], other=0.0)
        code = add_product(code, x, down, PRECISION)
    # Rounded as it would be between two linear layers; the backward reads what was used.
    low = code.to(x_ptr.dtype.element_ty)
    tl.store(code_ptr + m[:, None] * rank + r[None, :], low, mask=in_m[:, None] & in_r[None, :])
    for start in range(0, outputs, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        in_n = n < outputs
        up = tl.load(up_ptr + n[None, :] * up_output + r[:, None] * up_rank,
                     mask=in_r[:, None] & in_n[None, :], other=0.0)
        out = add_product(tl.zeros((ROWS, COLUMNS), tl.float32), low, up, PRECISION)
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + m[:, None] * outputs + n[None, :], out.to(out_ptr.dtype.element_ty),
                 mask=in_m[:, None] & in_n[None, :])


def _map(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(x down') up' + bias` and `x down'`, for x of [rows, inputs], contiguous."""
    (rows, inputs), (outputs, rank) = x.shape, up.shape
    out, code = x.new_empty(rows, outputs), x.new_empty(rows, rank)
    if out.numel():
        with on_device_of(x):
            low_rank_map[(triton.cdiv(rows, ROWS),)](
                x, down, up, x if bias is None else bias.contiguous(), out, code,
                rows, inputs, rank, outputs, *down.stride(), *up.stride(),
                HAS_BIAS=bias is not None, PRECISION=precision_of(x),
                RANK=max(16, triton.next_power_of_2(rank)),
                ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER,
            )
    return out, code


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        out, code = _map(x, down, up, bias)
        ctx.save_for_backward(x, down, up, code)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, code = ctx.saved_tensors
        grad = grads[0].contiguous()
        for_x, for_down, for_up, for_bias = ctx.needs_input_grad
        g_x = g_code = None
        if for_x:
            g_x, g_code = _map(grad, up.mT, down.mT, None)
        elif for_down:
            g_code = grad @ up
        return (
            g_x,
            g_code.mT @ x if for_down and g_code is not None else None,
            grad.mT @ code if for_up else None,
            grad.sum(0) if for_bias else None,
        )


def low_rank(x: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None = None) -> Tensor:
    """`(x w_down') w_up' + b_up`.

    What Karn's template `low_rank` adds to its input; the residual is the caller's. No second
    derivative, and none of the speed above a rank of 128, where torch's products do it.

    Args:
        x: [..., C], of float32, bfloat16 or float16; sums are formed in float32, and in TF32
            only where `torch.backends.cuda.matmul.allow_tf32` says so.
        w_down: [R, C] and w_up: [C', R], as `nn.Linear` has them; b_up: [C'] or None.

    Returns:
        [..., C'], of the type of x.

    Raises:
        ValueError: shapes, element types or devices do not agree.
    """
    check_linear("low_rank", x, w_down, None)
    if w_up.ndim != 2 or w_up.shape[1] != w_down.shape[0]:
        raise ValueError(
            f"low_rank was given w_down of {list(w_down.shape)} and w_up of "
            f"{list(w_up.shape)}; they must be [R, C] and [C', R]"
        )
    check_linear("low_rank", x.new_empty(0, w_down.shape[0]), w_up, b_up)
    if w_down.shape[0] > MAX_RANK:
        return linear(linear(x, w_down), w_up, b_up)
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    out: Tensor = _LowRank.apply(flat, w_down, w_up, b_up)
    return out.reshape(*x.shape[:-1], w_up.shape[0])
