"""What a seed needs around the gated MLP and the low-rank map, so that all of it is Triton.

A kernel that is compiled for a GPU which is not here cannot call torch's operators: its products,
sums and norms are these. They are launched by a plan (esper/tezzeret/programs.py), never from
Python. Everything is contiguous but the factors of `product`; sums are formed in float32. Tile
sizes were never tuned on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from esper.triton_kernels.launch import add_product


@triton.jit
def combine(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, alpha_ptr, out_ptr, n, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    # HOW "graft": the blend of a and a + b at alpha; "scale": alpha a.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    to = out_ptr.dtype.element_ty
    alpha = tl.load(alpha_ptr)
    a = tl.load(a_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if HOW == "graft":
        b = tl.load(b_ptr + i, mask=inside, other=0.0).to(tl.float32)
        # Rounded as the seed's own output would be; selected at both ends, as leyline's blend is.
        seed = (a + b).to(to).to(tl.float32)
        mixed = a + alpha * (seed - a)
        out = tl.where(alpha == 0, a, tl.where(alpha == 1, seed, mixed))
    else:
        # Not a product at 0: a seed without influence learns nothing, whatever the gradient.
        out = tl.where(alpha == 0, 0.0, alpha * a)
    tl.store(out_ptr + i, out.to(to), mask=inside)


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, bias_ptr, add_ptr, out_ptr, rows, columns, inner,
    a_row, a_inner, b_inner, b_column,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):
    # out = a b [+ bias] [+ add]: a is [rows, inner] and b [inner, columns], of any strides.
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_m, in_n = m < rows, n < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, INNER):
        # 64 bits: inner may be the rows of a batch, and their stride is that of a row.
        k = (start + tl.arange(0, INNER)).to(tl.int64)
        in_k = k < inner
        a = tl.load(a_ptr + m[:, None] * a_row + k[None, :] * a_inner,
                    mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * b_inner + n[None, :] * b_column,
                    mask=in_k[:, None] & in_n[None, :], other=0.0)
        total = add_product(total, a, b, PRECISION)
    at = m[:, None] * columns + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if HAS_ADD:
        total += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sum(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, scale_ptr, out_ptr, rows, columns,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # Over the rows of x [rows, columns]; where WEIGHTED, of x times y times one scale per row.
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_n = n < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        m = (start + tl.arange(0, ROWS)).to(tl.int64)
        in_m = m < rows
        at = m[:, None] * columns + n[None, :]
        inside = in_m[:, None] & in_n[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = x * y * tl.load(scale_ptr + m, mask=in_m, other=0.0)[:, None]
        total += x
    tl.store(out_ptr + n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def rms_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, scale_ptr, rows, columns,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # out = x scale weight, where scale = (mean(x^2) + EPS)^(-1/2), one per row, kept in float32.
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < rows
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        inside = in_m[:, None] & (n < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * columns + n[None, :], mask=inside, other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(squares, 1) / columns + EPS)
    tl.store(scale_ptr + m, scale, mask=in_m)
    for start in range(0, columns, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        at = m[:, None] * columns + n[None, :]
        inside = in_m[:, None] & (n < columns)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=n < columns, other=0.0).to(tl.float32)
        out = x * scale[:, None] * weight[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, weight_ptr, scale_ptr, add_ptr, out_ptr, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # out = add + scale (w g - x scale^2 mean(w g x)), the gradient of x beside what else it has.
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < rows
    scale = tl.load(scale_ptr + m, mask=in_m, other=0.0)
    inner = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        at = m[:, None] * columns + n[None, :]
        inside = in_m[:, None] & (n < columns)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=n < columns, other=0.0).to(tl.float32)
        inner += grad * weight[None, :] * x
    pull = tl.sum(inner, 1) / columns * scale * scale
    for start in range(0, columns, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        at = m[:, None] * columns + n[None, :]
        inside = in_m[:, None] & (n < columns)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=n < columns, other=0.0).to(tl.float32)
        out = scale[:, None] * (grad * weight[None, :] - x * pull[:, None])
        out += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
