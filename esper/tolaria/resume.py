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
from esper.kasmina.rng import apart
from esper.tolaria.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from esper.tolaria.ranks import Ranks
from esper.tolaria.sharded import whole
from esper.tolaria.snapshot import Snapshot
from esper.tolaria.trees import Pairs, copy_all, from_bytes, mirror, pack, to_bytes

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


def keep(session: Session) -> None:
    """Write an automatic checkpoint."""
    if session.checkpoints is not None:
        write = take(session)
        if session._team.first:
            session.checkpoints.submit(write, session.growth.step)


def take(session: Session) -> Callable[[Path], Path]:
    """Copy the state of this moment; what is returned writes it, and may be called by any thread.

    The state holds the run twice where it is in the middle of an epoch: as it is, and as it was
    when it was last known to be good, which is what a rollback goes back to.

    Where several ranks train, all of them call this: sharded tensors are put together, and what
    belongs to a rank alone (random states, registered parts) comes to rank 0, which alone writes.
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
    tree = {
        "growth": describe(session.growth).model_dump(mode="json"),
        "now": whole(now.tree(names)),
        # Where nothing has happened since, the good state is this one, less what is on its way.
        "good": {"rng": snapshot.rng} if session._as_captured else whole(snapshot.tree(names)),
        "session": {name: getattr(session, name) for name in _KEPT},
        "losses": session._losses.state_dict(),
        "reported": session._link.reported,
        "policy": _state(session.policy),
        "registered": registered,
    }
    ranks = session._team.ranks
    if ranks.size > 1:
        own = {"rng": now.rng, "good_rng": snapshot.rng, "registered": registered}
        parts = ranks.gather(to_bytes(own))
        tree["ranks"] = [from_bytes(part) for part in parts] if ranks.first else []
    if not ranks.first:
        return lambda path: path
    state = pack(tree, tensors)
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
    held = _read(session._team.ranks, Path(path))
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


def _read(ranks: Ranks, path: Path) -> Checkpoint:
    """Every rank reads for itself; which one, and whether it is good, rank 0 finds out first."""
    held, told = None, ("", "")
    if ranks.first:
        try:
            held = read_checkpoint(path)
            told = held.path.name, ""
        except CheckpointError as e:
            if ranks.size == 1:
                raise
            told = "", str(e)
    name, error = ranks.from_first(told)
    if error:
        raise CheckpointError(error)
    return held or read_checkpoint(path if path.name == name else path / name)


def _own(state: dict[str, Any], ranks: Ranks) -> int:
    """Put this rank's own parts into their places; returns of how many ranks the run was.

    With another number of ranks, those that there were go on from their random states; the others
    take up from one of them, and draw otherwise.
    """
    entries = state.get("ranks") or [{
        "rng": state["now"]["rng"], "good_rng": state["good"]["rng"],
        "registered": state["registered"]}]
    own = entries[ranks.rank % len(entries)]
    if ranks.rank >= len(entries):
        own["rng"] = own["good_rng"] = apart(own["rng"], ranks.rank)
    state["now"]["rng"], state["good"]["rng"] = own["rng"], own["good_rng"]
    state["registered"] = own["registered"]
    return len(entries)


def _restore(session: Session, state: dict[str, Any]) -> None:
    growth, parts, ranks = session.growth, session.parts, session._team.ranks
    were = _own(state, ranks)
    revive(growth, GrowthRecord.model_validate(state["growth"]), session._link.loader)
    session._team.share_pending()
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
    if were != ranks.size:  # as many samples are done, not as many steps
        session.batch = session.batch * were // ranks.size
        log.warning("the checkpoint is of %d processes, and there are %d now: the run goes on from "
                    "its state, and from about its place in the data", were, ranks.size)
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
