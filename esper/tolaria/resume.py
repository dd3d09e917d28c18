"""What of a session goes into a checkpoint, and how a fresh session becomes that one again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from esper.errors import CheckpointError, EsperError
from esper.kasmina.revive import GrowthRecord, describe, revive
from esper.tolaria.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from esper.tolaria.snapshot import Snapshot
from esper.tolaria.trees import Pairs, copy_all, mirror, pack

if TYPE_CHECKING:
    from esper.tolaria.session import Session

log = logging.getLogger(__name__)

# Attributes of a session that are plain values and go with it.
_KEPT = ("run_id", "rollbacks", "growth_steps", "batch", "_train_losses", "_holdout_losses",
         "_evidence", "_born", "_used", "_rolled_back", "_contexts")


class Stateful(Protocol):
    """What torch calls so: state as plain values and tensors, out and in again."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def take(session: Session) -> Callable[[Path], Path]:
    """Copy the state of this moment; what is returned writes it, and may be called by any thread.

    The state holds the run twice where it is in the middle of an epoch: as it is, and as it was
    when it was last known to be good, which is what a rollback goes back to.
    """
    names, snapshot = session.parts.names(), session._snapshot
    now, taken = Snapshot(session.parts, (), session._spare), time.time()
    # Kept for the next checkpoint, but on a GPU, where fresh memory costs nothing and is scarce.
    session._spare = now if all(t.device.type == "cpu" for t in now.tensors) else None
    pairs: Pairs = []
    registered = {n: mirror(None, part.state_dict(), pairs) for n, part in
                  session._stateful.items()}
    copy_all(pairs)
    tensors: dict[str, Tensor] = {}
    state = pack({
        "growth": describe(session.growth).model_dump(mode="json"),
        "now": now.tree(names),
        # Where nothing has happened since, the good state is this one, less what is on its way.
        "good": {"rng": snapshot.rng} if session._as_captured else snapshot.tree(names),
        "session": {name: getattr(session, name) for name in _KEPT},
        "losses": session._losses.state_dict(),
        "reported": session._link.reported,
        "policy": _state(session.policy),
        "registered": registered,
    }, tensors)
    write_it = partial(
        write_checkpoint, state=state, tensors=tensors, run_id=session.run_id,
        step=session.growth.step, epoch=session.growth.epoch, taken=taken)
    lent = (now,) if session._as_captured else (now, snapshot)
    for held in lent:
        held.lent = True

    def write(path: Path) -> Path:
        try:
            return write_it(path)
        finally:
            for held in lent:
                held.lent = False

    return write


def _state(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else None


def restore(session: Session, path: str | os.PathLike[str]) -> Checkpoint:
    """Make a fresh session the one of the checkpoint at `path`.

    Raises:
        CheckpointError: see `read_checkpoint`; or it does not fit the session's parts.
    """
    held = read_checkpoint(path)
    try:
        _restore(session, held.state)
    except (KeyError, TypeError, ValueError, AttributeError, EsperError, ValidationError) as e:
        if isinstance(e, CheckpointError):
            raise CheckpointError(f"{held.path}: {e}") from e
        raise CheckpointError(
            f"{held.path} does not fit this run ({type(e).__name__}: {e}); resume with the model, "
            "optimizer, scheduler, scaler and average it was made with"
        ) from e
    log.info("resumed run %s at step %d from %s", session.run_id, session.growth.step, held.path)
    return held


def _restore(session: Session, state: dict[str, Any]) -> None:
    growth, parts = session.growth, session.parts
    revive(growth, GrowthRecord.model_validate(state["growth"]), session._loader)
    if session._average is not None:
        session._average.follow()
    now = Snapshot.from_tree(state["now"], parts)
    _join_in_order(session, now)
    now.restore(parts)
    session._surgeon.watch_warm_up()
    state["session"].setdefault("_contexts", {})  # older checkpoints have none
    for name in _KEPT:
        value = state["session"][name]
        if type(value) is not type(getattr(session, name)):
            raise CheckpointError(f"{name} is a {type(value).__name__}")
        setattr(session, name, value)
    session._losses.load_state_dict(state["losses"])
    session._link.reported |= state["reported"]
    if state["policy"] is not None:
        session.policy.load_state_dict(state["policy"])  # type: ignore[attr-defined]
    session._unclaimed = state["registered"]
    for name in session._stateful.keys() & session._unclaimed.keys():
        session._stateful[name].load_state_dict(session._unclaimed.pop(name))
    if state["good"].keys() == {"rng"}:
        session._capture()
        session._snapshot.rng = state["good"]["rng"]
    else:
        session._snapshot = Snapshot.from_tree(state["good"], parts)
        session._as_captured = False


def _join_in_order(session: Session, now: Snapshot) -> None:
    """Seeds join the optimizer in the order of their groups, which is that of its state."""
    groups = session.optimizer.param_groups
    hosts = len(groups)
    for members in now.members[hosts:]:
        session.growth.on_join(members)
    names = session.parts.names()
    here = [[names[p] for p in g["params"]] for g in session.optimizer.param_groups]
    there = [[names[p] for p in group] for group in now.members]
    if here != there:
        odd = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b),
                   min(len(here), len(there)))
        raise CheckpointError(
            f"parameter group {odd} of the optimizer does not have the parameters that it had; "
            "make the optimizer as it was made for the first run, from the host alone"
        )
