"""Tensors of which every rank holds a part (DTensor, from `fully_shard`), beside plain ones.

torch's operations on lists refuse a mixture of the two. Copies of a run are made part by part, each
rank its own; a checkpoint holds whole tensors, so that any number of ranks can read it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.parallel import sharded_modules


def is_sharded(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def part(tensor: Any) -> Tensor:
    """This rank's part, in the same memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tree: Any) -> Any:
    """A tree with whole tensors on the CPU in the place of sharded ones. A collective where there
    are any: one gathering for each of them, in the order of the tree."""
    if is_sharded(tree):
        with torch.no_grad():
            return tree.full_tensor().cpu()
    if type(tree) is dict:
        return {k: whole(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(whole(v) for v in tree)
    return tree


def as_sharded(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, of which every rank has a copy, sharded as `like` is. Nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    held = distribute_tensor(tensor.detach(), like.device_mesh, like.placements,
                             src_data_rank=None)
    return held.clone()  # a part that is a view would keep the whole


def settle(model: nn.Module) -> None:
    """Let a sharded model hold its sharded parameters: after an evaluation the root still has the
    whole ones in their place. Nothing is sent."""
    for module in sharded_modules(model):
        module.reshard()


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model whose host is sharded and whose seeds are not.

    Returns the norm of all gradients together, the same on every rank. A collective where there
    are sharded ones.
    """
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    with torch.no_grad():
        norms = []
        for kind in (True, False):
            if of_kind := [g for g in grads if is_sharded(g) is kind]:
                norm: Any = torch.nn.utils.get_total_norm(of_kind, norm_type)
                norms.append(norm.full_tensor() if kind else norm)
        if not norms:
            return torch.tensor(0.0)
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            part(grad).mul_(factor.to(grad.device))
    return total
