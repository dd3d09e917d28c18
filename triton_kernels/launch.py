"""What the kernels share: where they are launched, and what they may be given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors'. Interpreted, on the CPU."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def precision_of(tensor: Tensor) -> str:
    """PRECISION of `add_product`: TF32 for float32 only where torch's own products use it."""
    if not tensor.is_cuda:
        return "widened"
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + a b, summed in float32."""
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers. In float32
    # the products are the same: those of two 16-bit numbers are exact there.
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """That `weight` [out, in] and `bias` [out] can be applied to `x` [..., in].

    Raises:
        ValueError: shapes, element types or devices do not agree, or the type is none of DTYPES.
    """
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} was given {x.dtype}; it takes {', '.join(str(d) for d in DTYPES)}"
        )
    if weight.ndim != 2 or x.ndim == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name} was given a weight of {list(weight.shape)} for an input of "
            f"{list(x.shape)}; it must be [out, {x.shape[-1] if x.ndim else 'in'}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} was given a bias of {list(bias.shape)} for a weight of "
            f"{list(weight.shape)}; it must be [{weight.shape[0]}]"
        )
    for other in (weight, bias):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(
                f"{name} was given an input of {x.dtype} on {x.device} and a parameter of "
                f"{other.dtype} on {other.device}; all must agree"
            )
