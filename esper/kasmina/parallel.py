"""What torch makes of a model that several processes train, told apart without importing it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from esper.errors import SiteError


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nobody can have called it
        return []
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def check_not_parallel(model: nn.Module) -> None:
    """
    Raises:
        SiteError: the model is parallel already. Its parts have other names then, and other
            parameters, than those that checkpoints and sites go by.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    old = fsdp is not None and any(
        isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    for name, found in (
        ("DistributedDataParallel", isinstance(model, DistributedDataParallel)),
        ("DataParallel", isinstance(model, DataParallel)),
        ("FullyShardedDataParallel", old),
        ("fully_shard", bool(sharded_modules(model))),
    ):
        if found:
            raise SiteError(f"the model has been through {name} already; wrap it first: "
                            f"esper.wrap(model, ...), then {name}, then the optimizer")
