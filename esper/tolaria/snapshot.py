"""A copy of the run in memory, to go back to when it goes wrong, and to be written to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import CheckpointError, EsperError
from esper.kasmina.rng import rng_state, set_rng_state
from esper.tolaria.optimizer import only_groups
from esper.tolaria.sharded import as_sharded, is_sharded, settle
from esper.tolaria.trees import Pairs, copy_all, mirror


@dataclass(frozen=True)
class Parts:
    """What a run consists of besides its growth. `model` is the model as it was written, not what
    torch.compile made of it; `scaler` a GradScaler, `ema` a module that averages the weights."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any = None
    scaler: Any = None
    ema: nn.Module | None = None

    def names(self) -> dict[Tensor, str]:
        """Every parameter and buffer under one name; what is shared has its first one. A compiled
        average has the names of a plain one, and a sharded model is looked at sharded."""
        settle(self.model)
        found: dict[Tensor, str] = {}
        for prefix, module in (("model", self.model), ("ema", self.ema)):
            if module is not None:
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    found.setdefault(tensor, f"{prefix}.{name.replace('_orig_mod.', '')}")
        return found


class Snapshot:
    """Parameters, buffers, optimizer state and settings, scheduler, scaler, average, random states.

    Parameters in `without` (seeds on their way, which do not outlive a rollback) are left out.
    `restore` expects the same parameters, less those, to be in the model again.

    With `reuse`, an older snapshot gives its memory and is of no use any more: fresh memory costs
    several times what the copying does, for the system hands it out page by page. One that is
    being written to disk (`lent`) keeps its own.
    """

    def __init__(
        self, parts: Parts, without: Collection[int] = (), reuse: Snapshot | None = None
    ) -> None:
        self.lent = False
        self.whole = False
        old = None
        if reuse is not None and not reuse.lent:
            old, reuse.whole = reuse, False
        pairs: Pairs = []
        live = {t: t for t in parts.names() if id(t) not in without}
        self.tensors: dict[Tensor, Tensor] = mirror(old and old.tensors, live, pairs)
        state = {p: s for p, s in parts.optimizer.state.items() if id(p) not in without}
        self.optimizer: dict[Tensor, Any] = mirror(old and old.optimizer, state, pairs)
        copy_all(pairs)
        groups = parts.optimizer.param_groups
        kept = [i for i, g in enumerate(groups)
                if not g["params"] or any(id(p) not in without for p in g["params"])]
        self.members = [list(groups[i]["params"]) for i in kept]
        self.groups = [
            {k: copy.deepcopy(v) for k, v in groups[i].items() if k != "params"} for i in kept
        ]
        self.scheduler = only_groups(_state(parts.scheduler), kept, len(groups))
        self.scaler = _state(parts.scaler)
        self.rng = rng_state()
        self.whole = True

    def restore(self, parts: Parts) -> None:
        """Put everything back, into the tensors that are there.

        Raises:
            EsperError: the snapshot was given up, or the parameters are others now.
        """
        if not self.whole:
            raise EsperError("this snapshot was interrupted while it was taken; there is nothing "
                             "to go back to, start from a checkpoint")
        settle(parts.model)
        groups = parts.optimizer.param_groups
        if len(groups) != len(self.groups):
            raise EsperError(f"the optimizer has {len(groups)} parameter groups, the state to go "
                             f"back to has {len(self.groups)}")
        pairs: Pairs = list(self.tensors.items())
        state = parts.optimizer.state
        for p in [p for p in state if p not in self.optimizer]:
            del state[p]
        for p, saved in self.optimizer.items():
            state[p] = mirror(state.get(p), saved, pairs)
        copy_all(pairs)
        for group, settings in zip(groups, self.groups, strict=True):
            for gone in group.keys() - settings.keys() - {"params"}:
                del group[gone]
            group.update(copy.deepcopy(settings))
        for part, saved in ((parts.scheduler, self.scheduler), (parts.scaler, self.scaler)):
            if saved:
                part.load_state_dict(copy.deepcopy(saved))
        parts.optimizer.zero_grad(set_to_none=True)
        set_rng_state(self.rng)

    # -- as plain values ------------------------------------------------------------------

    def tree(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """For `trees.pack`; parameters and buffers by `names`, see `Parts.names`. Nothing is
        copied."""
        return {
            "tensors": {names[t]: held for t, held in self.tensors.items()},
            "optimizer": {names[p]: state for p, state in self.optimizer.items()},
            "members": [[names[p] for p in group] for group in self.members],
            "groups": self.groups, "scheduler": self.scheduler, "scaler": self.scaler,
            "rng": self.rng,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], parts: Parts) -> Snapshot:
        """A snapshot that `tree` describes, of the parameters and buffers in `parts` by name.

        Raises:
            CheckpointError: it names what is not there, or something of another size or type.
        """
        live = {name: tensor for tensor, name in parts.names().items()}
        made = cls.__new__(cls)
        made.lent, made.tensors, made.optimizer = False, {}, {}
        made.whole = False
        for name, held in tree["tensors"].items():
            target = _named(live, name)
            if held.shape != target.shape or held.dtype != target.dtype:
                raise CheckpointError(
                    f"{name} is {target.dtype} {list(target.shape)} in this model, the checkpoint "
                    f"has {held.dtype} {list(held.shape)}; resume with the model it was made of"
                )
            made.tensors[target] = as_sharded(held, target) if is_sharded(target) else held
        for name, state in tree["optimizer"].items():
            p = _named(live, name)
            made.optimizer[p] = _leaves(state, partial(_as_torch_would, p))
        made.members = [[_named(live, name) for name in group] for group in tree["members"]]
        made.groups, made.scheduler = tree["groups"], tree["scheduler"]
        made.scaler, made.rng = tree["scaler"], tree["rng"]
        made.whole = True
        return made


def _state(part: Any) -> Any:
    return None if part is None else copy.deepcopy(part.state_dict())


def _named(live: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in live:
        raise CheckpointError(
            f"the checkpoint has {name}, and there is nothing of that name; resume with the same "
            "model, wrapped at the same sites, and with the same average"
        )
    return live[name]


def _leaves(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {k: _leaves(v, change) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_leaves(v, change) for v in state)
    return state


def _as_torch_would(parameter: Tensor, held: Tensor) -> Tensor:
    """Laid out and placed as an optimizer makes its state: like its parameter. Sums over another
    layout need not be equal to the last bit."""
    if is_sharded(parameter):
        return as_sharded(held, parameter) if held.shape == parameter.shape else held
    if held.device.type != parameter.device.type or held.shape != parameter.shape:
        return held
    like = torch.empty_like(parameter, dtype=held.dtype, requires_grad=False)
    return like.copy_(held)
