"""Events in the library's own database, each kept until every subscriber has done its work.

What the library itself has to say is written in the transaction that makes it true, so a fact
and its event are there both or not at all, whatever kills the process. Every function runs
inside a write transaction of the caller, `following` in any.

An event that nobody subscribed to is not kept, and one that all have acknowledged is deleted.
"""

from __future__ import annotations

import json
import logging
import sqlite3

from esper.errors import NotInLibrary, QueueFull
from esper.leyline.base import Contract
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.payloads import announce
from esper.oona.queue import Item, admit

log = logging.getLogger(__name__)
KEPT_SECONDS = 86_400.0  # of a subscription that nobody opens: its owner may come back
KEPT_EVENTS = 4096  # for one subscription
MAX_SUBSCRIPTIONS, MAX_NAME = 128, 200
MAX_EVENT_CHARS = 1 << 18  # of what others publish


def subscribe(
    con: sqlite3.Connection, name: str, topics: frozenset[Topic], now: float
) -> None:
    """See `EventStore`."""
    wanted = json.dumps(sorted(topics))
    for old, known, seen in con.execute("SELECT name, topics, seen FROM subscriptions").fetchall():
        if (now - seen > KEPT_SECONDS) if old != name else (known != wanted):
            con.execute("DELETE FROM undelivered WHERE name = ?", (old,))
            con.execute("DELETE FROM subscriptions WHERE name = ?", (old,))
    con.execute(
        "DELETE FROM outbox WHERE NOT EXISTS "
        "(SELECT 1 FROM undelivered WHERE undelivered.seq = outbox.seq)"
    )
    (others,) = con.execute(
        "SELECT count(*) FROM subscriptions WHERE name != ?", (name,)
    ).fetchone()
    if others >= MAX_SUBSCRIPTIONS:
        raise QueueFull(
            f"{others} subscriptions are kept, the most there may be; one that nobody opens for a "
            "day is dropped"
        )
    con.execute(
        "INSERT INTO subscriptions (name, topics, seen) VALUES (?, ?, ?) "
        "ON CONFLICT (name) DO UPDATE SET seen = excluded.seen",
        (name, wanted, now),
    )


def following(con: sqlite3.Connection, topic: Topic) -> list[str]:
    """Who subscribed to `topic`."""
    rows = con.execute("SELECT name, topics FROM subscriptions").fetchall()
    return [name for name, topics in rows if not (kept := json.loads(topics)) or topic in kept]


def say(
    con: sqlite3.Connection, topic: Topic, payload: Contract, *, trace_id: str,
    priority: Priority = Priority.NORMAL, now: float,
) -> None:
    """Keep an event of the library's own for who wants it."""
    if following(con, topic):
        event = announce(topic, payload, sender="urza", trace_id=trace_id, priority=priority)
        append(con, event.model_copy(update={"time": now}), now)


def append(con: sqlite3.Connection, event: Event, now: float) -> None:
    """Keep `event` for who wants it. A full subscription drops by the policy of all queues."""
    names = [name for name in following(con, event.topic) if _make_room(con, name, event, now)]
    if not names:
        return
    made = con.execute(
        "INSERT OR IGNORE INTO outbox (event_id, time, event) VALUES (?, ?, ?)",
        (event.event_id, now, event.model_dump_json()),
    )
    if made.rowcount:  # else it was published before, and whoever sent it did not know
        con.executemany(
            "INSERT INTO undelivered (name, priority, seq) VALUES (?, ?, ?)",
            [(name, int(event.priority), made.lastrowid) for name in names],
        )


def _make_room(con: sqlite3.Connection, name: str, event: Event, now: float) -> bool:
    (waiting,) = con.execute(
        "SELECT count(*) FROM undelivered WHERE name = ?", (name,)
    ).fetchone()
    if waiting < KEPT_EVENTS:
        return True
    rows = con.execute(
        "SELECT seq, priority, time FROM undelivered JOIN outbox USING (seq) WHERE name = ?",
        (name,),
    ).fetchall()
    admission = admit(
        [Item(seq, Priority(priority), time, 0.0) for seq, priority, time in rows],
        Item(-1, event.priority, now, 0.0), KEPT_EVENTS, now,
    )
    if admission.dropped is not None:
        con.execute(
            "DELETE FROM undelivered WHERE name = ? AND seq = ?", (name, admission.dropped)
        )
    if admission.dropped is not None or not admission.accepted:
        log.warning("%s is too slow or away, an event is lost to it: %s", name, admission.reason)
    return admission.accepted


def first(con: sqlite3.Connection, name: str) -> Event | None:
    """See `EventStore.next_event`."""
    row = con.execute(
        "SELECT event FROM undelivered JOIN outbox USING (seq) WHERE name = ? "
        "ORDER BY priority, seq LIMIT 1",
        (name,),
    ).fetchone()
    if row is not None:
        return Event.model_validate_json(row["event"])
    if con.execute("SELECT 1 FROM subscriptions WHERE name = ?", (name,)).fetchone() is None:
        raise NotInLibrary(f"nobody subscribed as {name!r}, or that was dropped; subscribe again")
    return None


def acknowledge(con: sqlite3.Connection, name: str, event_id: str) -> None:
    """See `EventStore`."""
    row = con.execute("SELECT seq FROM outbox WHERE event_id = ?", (event_id,)).fetchone()
    if row is None:
        return
    con.execute("DELETE FROM undelivered WHERE name = ? AND seq = ?", (name, row["seq"]))
    con.execute(
        "DELETE FROM outbox WHERE seq = :seq AND NOT EXISTS "
        "(SELECT 1 FROM undelivered WHERE seq = :seq)",
        {"seq": row["seq"]},
    )
