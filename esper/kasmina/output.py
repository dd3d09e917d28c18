"""What a module returns, and the tensor in it that grows.

Plain torch: `export` writes the source of these functions into the file it generates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def parts_of(output: Any) -> list[tuple[Any, Any]]:
    """(place, part) of a tuple, a list, a mapping or a dataclass; empty for anything else."""
    if isinstance(output, Mapping):  # before dataclasses: transformers' outputs are both
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if is_dataclass(output):
        return [(f.name, getattr(output, f.name)) for f in fields(output)]
    return []


def first_tensor(output: Any) -> Any:
    """The tensor that a seed would blend; None where there is none.

    It is the output itself, or the first of its parts that is a float tensor of two dimensions or
    more: scalars that come before it, a loss say, are passed over.
    """
    if isinstance(output, torch.Tensor):
        return output
    for _, part in parts_of(output):
        if isinstance(part, torch.Tensor) and part.ndim > 1 and part.is_floating_point():
            return part
    return None


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """The same output with `tensor` in the place of its `first_tensor`; `output` is not changed."""
    if isinstance(output, torch.Tensor):
        return tensor
    first = first_tensor(output)
    place = next(place for place, part in parts_of(output) if part is first)
    if isinstance(output, tuple):
        parts = (*output[:place], tensor, *output[place + 1 :])
        if hasattr(output, "_fields"):  # a named tuple
            return type(output)(*parts)
        return parts if type(output) is tuple else type(output)(parts)
    if type(output) is dict:
        return {**output, place: tensor}  # torch.compile can follow this, and no copy.copy
    changed = copy.copy(output)
    if isinstance(output, (list, Mapping)):
        changed[place] = tensor
    else:
        object.__setattr__(changed, place, tensor)  # frozen ones too
    return changed
