"""The library's two queues: admission, claims, leases. Oona's policy on rows of the database.

Blueprints wait for Tezzeret, kernels for Urabrask; both tables have the columns that this
module needs, and a `Line` says how the statuses are called. Every function runs inside a
write transaction of the caller.

A claim gets a fencing token from one counter for the whole library, so a later claim always
has a higher token. Who writes shows its token; if the item's lease is over or carries another
token, nothing is written.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from esper.errors import ContractError, NotInLibrary, QueueFull, StaleClaim
from esper.leyline.artifact import Runtime
from esper.leyline.events import Priority
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, check
from esper.oona.queue import (
    KARN_TO_TEZZERET,
    LIMITS,
    MAX_ATTEMPTS,
    TEZZERET_TO_URABRASK,
    Item,
    admit,
    may_return,
    rank,
)

# A kernel that nobody could run for so long makes room; it comes back for who can.
UNRUNNABLE_SECONDS = 3600.0


@dataclass(frozen=True)
class Line:
    """One queue and its table. `dropped` is the status of what was shed from it, `spent` of
    what has cost too many workers."""

    table: str
    item: str  # column of the id that the history is kept under
    queue: str
    waiting: StrEnum
    working: StrEnum
    dropped: StrEnum
    spent: StrEnum

    @property
    def limit(self) -> int:
        return LIMITS[self.queue]

    def status(self, row: sqlite3.Row, column: str = "status") -> StrEnum:
        return type(self.waiting)(row[column])


BLUEPRINTS = Line(
    "blueprints", "blueprint_id", KARN_TO_TEZZERET,
    BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING, BlueprintStatus.ARCHIVED,
    BlueprintStatus.INVALID,
)
KERNELS = Line(
    "kernels", "kernel_id", TEZZERET_TO_URABRASK,
    KernelStatus.PENDING_BENCHMARKING, KernelStatus.BENCHMARKING, KernelStatus.RETIRED,
    KernelStatus.REJECTED,
)


@dataclass(frozen=True)
class Lease:
    """What a claim record is made of. `seq` is the item's row."""

    seq: int
    token: int
    expires: float


def check_lease(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ContractError(f"a lease lasts a positive number of seconds, given {seconds}")


def born(con: sqlite3.Connection, line: Line, seq: int, now: float, reason: str) -> None:
    """Open the history of a row that was just inserted."""
    con.execute(
        f"INSERT INTO events (time, item, signature_id, after, reason) SELECT ?, {line.item}, "
        f"signature_id, status, ? FROM {line.table} WHERE seq = ?",
        (now, reason, seq),
    )


def move(
    con: sqlite3.Connection,
    line: Line,
    seq: int,
    after: StrEnum,
    reason: str,
    now: float,
    *,
    shed: bool = False,
) -> None:
    """Change a status, end any lease, and write it into the history.

    Raises:
        IllegalTransition: the table of leyline does not have it; nothing is written.
    """
    row = con.execute(
        f"SELECT {line.item}, signature_id, status FROM {line.table} WHERE seq = ?", (seq,)
    ).fetchone()
    check(line.status(row), after)
    con.execute(
        f"UPDATE {line.table} SET status = ?, reason = ?, updated = ?, shed = ?, "
        "returns_to = NULL, worker = NULL, token = NULL, expires = NULL WHERE seq = ?",
        (after, reason, now, shed, seq),
    )
    con.execute(
        "INSERT INTO events (time, item, signature_id, before, after, reason) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (now, row[line.item], row["signature_id"], row["status"], after, reason),
    )


_TORCH, _ISA = (f"json_extract(manifest, '$.toolchain.{what}')" for what in ("torch", "isa"))


def _items(
    con: sqlite3.Connection,
    line: Line,
    status: StrEnum,
    runtime: Runtime | None = None,
    *,
    shed: bool = False,
    leave: Collection[tuple[str, str]] = (),
) -> list[Item[int]]:
    """The items of a status; only the kernels that `runtime` can run, where one is given, and
    none of `leave`, which are ids of an item and its signature."""
    where, given = "status = ? AND shed = ?", [status, int(shed)]
    if runtime is not None:
        where += f" AND {_TORCH} = ? AND {_ISA} IN ({', '.join('?' * len(runtime.isas))})"
        given += [runtime.torch, *runtime.isas]
    if leave:
        pairs = ", ".join(["(?, ?)"] * len(leave))
        where += f" AND ({line.item}, signature_id) NOT IN (VALUES {pairs})"
        given += [word for pair in leave for word in pair]
    rows = con.execute(
        f"SELECT seq, priority, queued, interest FROM {line.table} WHERE {where}", given
    )
    return [Item(r[0], Priority(r[1]), r[2], r[3]) for r in rows]


def count(con: sqlite3.Connection, line: Line, status: StrEnum) -> int:
    query = f"SELECT count(*) FROM {line.table} WHERE status = ?"
    return int(con.execute(query, (status,)).fetchone()[0])


def arrival(priority: Priority, since: float, interest: float) -> Item[int]:
    """Something that has no row yet; it has waited, here or before here, since `since`."""
    return Item(-1, priority, since, interest)


def make_room(
    con: sqlite3.Connection, line: Line, arrival: Item[int], now: float, *, act: bool = True
) -> None:
    """Admit an arrival, dropping the item that the policy names; only ask where not `act`.

    Raises:
        QueueFull: the arrival is refused.
    """
    admission = admit(_items(con, line, line.waiting), arrival, line.limit, now)
    if not admission.accepted:
        raise QueueFull(f"{line.queue}: {admission.reason}")
    if act and admission.dropped is not None:
        move(con, line, admission.dropped, line.dropped, admission.reason, now, shed=True)


def readmit(
    con: sqlite3.Connection, line: Line, now: float, runtime: Runtime | None = None
) -> None:
    """Bring back the best shed item that `runtime` can run, if the policy lets it."""
    shed = _items(con, line, line.dropped, runtime, shed=True)
    if not shed:
        return
    best = min(shed, key=lambda i: rank(i, now))
    if may_return(best, count(con, line, line.waiting), line.limit, now):
        move(con, line, best.key, line.waiting, "back in the queue, which has room again", now)


def set_aside(con: sqlite3.Connection, runtime: Runtime, now: float) -> None:
    """Let go, for now, of kernels that have waited for a machine that can run them.

    After a change of torch nobody may be left who runs the old kernels. In the queue they
    would keep it full, and everybody slowed, for ever; emergencies stay even so. `runtime` is
    that of a worker who asks; others are known by the kernels that they took of late.
    """
    built_with = f"SELECT seq, {_TORCH} AS torch, {_ISA} AS isa FROM kernels WHERE "
    long_ago = now - UNRUNNABLE_SECONDS
    old = [
        row for row in con.execute(
            built_with + "status = ? AND created <= ? AND priority != ?",
            (KERNELS.waiting, long_ago, Priority.EMERGENCY),
        ) if row["torch"] != runtime.torch or row["isa"] not in runtime.isas
    ]
    if not old:
        return
    taken = {
        (row["torch"], row["isa"]) for row in con.execute(
            built_with + "updated > ? AND status IN (?, ?, ?)",
            (long_ago, KERNELS.working, KernelStatus.VALIDATED, KernelStatus.REJECTED),
        )
    }
    for row in old:
        if (row["torch"], row["isa"]) not in taken:
            reason = (
                f"no worker with torch {row['torch']} and {row['isa']} has taken a kernel for an "
                "hour; it comes back when one asks"
            )
            move(con, KERNELS, row["seq"], KERNELS.dropped, reason, now, shed=True)


def sweep(con: sqlite3.Connection, line: Line, now: float) -> int:
    """Return every item whose lease is over to where it was, unless it has cost too many
    workers; returns how many leases were over."""
    over = con.execute(
        f"SELECT seq, worker, returns_to, attempts + 1 AS attempts FROM {line.table} "
        "WHERE status = ? AND expires <= ?",
        (line.working, now),
    ).fetchall()
    for row in over:
        after = line.status(row, "returns_to")
        reason = f"the lease of {row['worker']} expired"
        if row["attempts"] >= MAX_ATTEMPTS:
            after = line.spent if after is line.waiting else after
            reason = (
                f"{row['attempts']} leases on it expired, the last of {row['worker']}; whoever "
                "works on it dies or hangs, so nobody is given it again"
            )
        move(con, line, row["seq"], after, reason, now)
        con.execute(
            f"UPDATE {line.table} SET attempts = ? WHERE seq = ?", (row["attempts"], row["seq"])
        )
    return len(over)


def first(
    con: sqlite3.Connection, line: Line, now: float, runtime: Runtime | None = None,
    *, leave: Collection[tuple[str, str]] = (),
) -> Item[int] | None:
    """The most urgent waiting item, none of `leave`; of kernels, the most urgent that `runtime`
    can run."""
    items = _items(con, line, line.waiting, runtime, leave=leave)
    return min(items, key=lambda i: (*rank(i, now), i.key), default=None)


def lease(
    con: sqlite3.Connection, line: Line, seq: int, worker: str, seconds: float, now: float
) -> Lease:
    """Give `seq` to `worker` under a fresh token."""
    (before,) = con.execute(f"SELECT status FROM {line.table} WHERE seq = ?", (seq,)).fetchone()
    move(con, line, seq, line.working, f"claimed by {worker}", now)
    con.execute("UPDATE fence SET token = token + 1")
    (token,) = con.execute("SELECT token FROM fence").fetchone()
    expires = now + seconds
    con.execute(
        f"UPDATE {line.table} SET returns_to = ?, worker = ?, token = ?, expires = ? WHERE seq = ?",
        (before, worker, token, expires, seq),
    )
    return Lease(seq, int(token), expires)


def held(
    con: sqlite3.Connection, line: Line, key: tuple[str, ...], token: int, now: float
) -> sqlite3.Row:
    """The row of a claim that still holds.

    Raises:
        NotInLibrary: no such item.
        StaleClaim: the lease is over, or the item is somebody else's.
    """
    where = f"{line.item} = ?" + (" AND signature_id = ?" if line is BLUEPRINTS else "")
    row: sqlite3.Row | None = con.execute(
        f"SELECT * FROM {line.table} WHERE {where}", key
    ).fetchone()
    if row is None:
        raise NotInLibrary(f"no {line.table[:-1]} {key[0]} in this library; was it claimed there?")
    if row["token"] != token or row["expires"] <= now:
        state = f"it is {row['status']}" + (f" with {row['worker']}" if row["worker"] else "")
        raise StaleClaim(
            f"the claim on {key[0]} with token {token} is over ({state} now) and nothing was "
            "written; drop the work and claim again, and send heartbeats more often"
        )
    return row
