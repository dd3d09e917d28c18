"""Optimizer surgery: parameters join and leave, the state of all others is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Adagrad, Muon, Optimizer, SparseAdam

from esper.errors import ContractError

# What a group or one of torch's schedulers keeps as a learning rate of a group.
_RATES = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_lrs", "max_lrs",
                    "min_lrs", "_last_lr"})
# Lists in which torch's schedulers keep one entry per group.
_PER_GROUP = ("base_lrs", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums",
              "_last_lr")
# (steps done, steps in all) of a group that is warming up; kept in the group, so that whatever
# saves and restores the optimizer's settings has it too.
WARM_UP = "esper_warm_up"


def per_group(scheduler: Any) -> Iterator[tuple[Any, str, list[Any]]]:
    """(scheduler, attribute, list) for every list with one entry per group, of a scheduler and of
    those it is made of (SequentialLR, ChainedScheduler); each list once."""
    seen: set[int] = set()
    waiting = [scheduler]
    while waiting:
        part = waiting.pop(0)
        for name in _PER_GROUP:
            values = getattr(part, name, None)
            if isinstance(values, list) and id(values) not in seen:
                seen.add(id(values))
                yield part, name, values
        waiting += getattr(part, "_schedulers", ())


def only_groups(state: Any, kept: Sequence[int], of: int) -> Any:
    """A scheduler's state_dict with the entries of the groups `kept`, out of `of`."""
    if not isinstance(state, dict) or len(kept) == of:
        return state
    made = dict(state)
    for name in _PER_GROUP:
        if isinstance(values := state.get(name), list) and len(values) == of:
            made[name] = [values[i] for i in kept]
    if isinstance(parts := state.get("_schedulers"), list):
        made["_schedulers"] = [only_groups(part, kept, of) for part in parts]
    return made


def why_not(optimizer: Optimizer) -> str:
    """Why no parameter can join this optimizer, "" where they can."""
    if isinstance(optimizer, LBFGS):
        return ("LBFGS keeps one history of all its parameters in a row, which has no place for "
                "new ones")
    if isinstance(optimizer, SparseAdam):
        return "SparseAdam takes sparse gradients only, and those of seeds are dense"
    return ""


class OptimizerSurgeon:
    """New parameters get a group of their own with the settings of the first group.

    `lr_scale` multiplies that group's learning rate, and over its first `warm_up` steps the rate
    rises to that in equal parts. Schedulers of torch's own are told of the new group; it follows
    the first group's schedule. They never see a warm-up: the rate is lowered for the time of a
    step only.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: Any = None, lr_scale: float = 1.0, warm_up: int = 0
    ) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.lr_scale, self.warm_up = lr_scale, warm_up
        self._watching = False
        self._rates: list[tuple[dict[str, Any], Any]] = []  # to put back after the step

    def join(self, params: Sequence[nn.Parameter]) -> None:
        """Add a group.

        Raises:
            ContractError: the optimizer cannot take them; says why. Nothing is changed.
        """
        reason = why_not(self.optimizer)
        if isinstance(self.optimizer, Muon) and any(p.ndim != 2 for p in params):
            shapes = ", ".join(str(list(p.shape)) for p in params if p.ndim != 2)
            reason = f"Muon takes matrices only, and the seed has parameters of {shapes}"
        if reason:
            raise ContractError(f"{reason}; train with another optimizer, or without this seed")
        first = self.optimizer.param_groups[0]
        settings = {k: copy.deepcopy(v) for k, v in first.items()
                    if k not in ("params", "param_names", WARM_UP)}
        for key in _RATES & settings.keys():
            settings[key] = settings[key] * self.lr_scale
        group: dict[str, Any] = {**settings, "params": list(params)}
        if self.warm_up:
            group[WARM_UP] = (0, self.warm_up)
        if "param_names" in first:  # all groups have them, or none
            group["params"] = [(f"esper.{id(p):x}", p) for p in params]
        self.optimizer.add_param_group(group)
        if isinstance(self.optimizer, Adagrad):
            # It makes its state when it is made, and misses that of parameters that come later.
            fresh = Adagrad([{**settings, "params": list(params)}])
            for p in params:
                self.optimizer.state[p] = fresh.state[p]
        for _, name, values in per_group(self.scheduler):
            values.append(values[0] * self.lr_scale if name in _RATES else values[0])
        self.watch_warm_up()

    def leave(self, params: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in params}
        if not gone:
            return
        kept = []
        groups = self.optimizer.param_groups
        before = len(groups)
        for index, group in enumerate(groups):
            had = bool(group["params"])
            stay = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in stay]
            if group["params"] or not had:
                kept.append(index)
        for _, _, values in per_group(self.scheduler):
            if len(values) == before:
                values[:] = [values[i] for i in kept]
        groups[:] = [groups[i] for i in kept]
        for p in params:
            self.optimizer.state.pop(p, None)

    # -- warm-up --------------------------------------------------------------------------

    def watch_warm_up(self) -> None:
        """Be there at every step from now on, where a group is warming up."""
        if not self._watching and any(WARM_UP in g for g in self.optimizer.param_groups):
            self._watching = True
            self.optimizer.register_step_pre_hook(self._lower)
            self.optimizer.register_step_post_hook(self._put_back)

    def _lower(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore_rates()  # of a step that failed half-way
        for group in optimizer.param_groups:
            if WARM_UP in group:
                done, total = group[WARM_UP]
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * ((done + 1) / (total + 1))

    def _put_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, _ in self._rates:
            done, total = group.pop(WARM_UP)
            if done + 1 < total:
                group[WARM_UP] = (done + 1, total)
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates.clear()
