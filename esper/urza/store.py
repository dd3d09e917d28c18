"""The SQLite file: connections, transactions, schema.

Invariants:
- Every write is one BEGIN IMMEDIATE transaction; it commits as a whole or leaves nothing.
- A connection is used by one thread at a time. Idle ones wait in a pool.
- No connection crosses a fork. SQLite keeps its locks in process memory that a child copies
  but that the kernel does not honour there, and a child's writes can then be lost. So all
  stores wait for their running transactions and close their connections before a fork. (A
  trainer forks whenever its data loader starts workers.)
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.errors import LibraryError

SCHEMA_VERSION = 3
_APPLICATION_ID = 0x45535052  # "ESPR": what `file` and this module know the database by
BUSY_SECONDS = 30.0

# `returns_to` is where a claimed item goes when its lease ends; `shed` marks what was dropped
# from a full queue, the only archived or retired items that may come back; `attempts` counts
# leases that expired.
_LEASED = """
    priority INTEGER NOT NULL,
    interest REAL NOT NULL,
    queued REAL NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    updated REAL NOT NULL,
    shed INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    returns_to TEXT,
    worker TEXT,
    token INTEGER,
    expires REAL"""

# Events for who subscribed, and to whom each has still to be delivered: see `outbox`.
_OUTBOX = (
    """CREATE TABLE subscriptions (
    name TEXT PRIMARY KEY,
    topics TEXT NOT NULL,
    seen REAL NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    event TEXT NOT NULL)""",
    """CREATE TABLE undelivered (
    name TEXT NOT NULL,
    priority INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (name, priority, seq)) WITHOUT ROWID""",
    "CREATE INDEX undelivered_by_event ON undelivered (seq)",
)

_SCHEMA = (
    """CREATE TABLE signatures (
    seq INTEGER PRIMARY KEY,
    signature_id TEXT NOT NULL UNIQUE,
    signature TEXT NOT NULL)""",
    f"""CREATE TABLE blueprints (
    seq INTEGER PRIMARY KEY,
    blueprint_id TEXT NOT NULL,
    signature_id TEXT NOT NULL,
    signature TEXT NOT NULL,
    ir TEXT NOT NULL,
    author TEXT NOT NULL,
    parents TEXT NOT NULL,
    pipeline TEXT,
    submitted REAL NOT NULL,{_LEASED},
    UNIQUE (blueprint_id, signature_id))""",
    "CREATE INDEX blueprints_by_status ON blueprints (status)",
    "CREATE INDEX blueprints_by_signature ON blueprints (signature_id)",
    """CREATE TABLE lineage (
    child TEXT NOT NULL,
    parent TEXT NOT NULL,
    PRIMARY KEY (child, parent)) WITHOUT ROWID""",
    f"""CREATE TABLE kernels (
    seq INTEGER PRIMARY KEY,
    kernel_id TEXT NOT NULL UNIQUE,
    blueprint_id TEXT NOT NULL,
    signature_id TEXT NOT NULL,
    manifest TEXT NOT NULL,
    digest TEXT NOT NULL,
    size INTEGER NOT NULL,
    report TEXT,
    created REAL NOT NULL,{_LEASED})""",
    "CREATE INDEX kernels_by_status ON kernels (status)",
    "CREATE INDEX kernels_by_signature ON kernels (signature_id)",
    """CREATE TABLE tags (
    name TEXT NOT NULL,
    kernel_id TEXT NOT NULL REFERENCES kernels (kernel_id),
    PRIMARY KEY (name, kernel_id)) WITHOUT ROWID""",
    """CREATE TABLE reports (
    seq INTEGER PRIMARY KEY,
    report_id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    report TEXT NOT NULL)""",
    """CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    item TEXT NOT NULL,
    signature_id TEXT NOT NULL,
    before TEXT,
    after TEXT NOT NULL,
    reason TEXT NOT NULL)""",
    "CREATE INDEX events_by_item ON events (item)",
    "CREATE TABLE fence (token INTEGER NOT NULL)",
    "INSERT INTO fence VALUES (0)",
    *_OUTBOX,
)

# What turns the version of the key into the next one. An old database is kept for each, in
# tests/urza/old, for ever.
_MIGRATIONS = {
    1: tuple(
        f"ALTER TABLE {table} ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0"
        for table in ("blueprints", "kernels")
    ),
    2: _OUTBOX,
}


class Store:
    """One database file, shared by threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opening = path.with_name(path.name + ".lock")
        self._fresh()
        with _forking:  # a fork walks through the set
            _STORES.add(self)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.read():
                pass  # opening once creates the schema, or refuses a foreign file now
        except OSError as e:
            raise LibraryError(
                f"cannot keep a library in {path.parent}: {e}; choose a folder you may write to"
            ) from e

    def _fresh(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._busy = 0
        self._paused = False
        self._pid = os.getpid()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; rolled back on any error."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the database."""
        with self._transaction("BEGIN DEFERRED") as connection:
            yield connection

    def close(self) -> None:
        """Close idle connections. The store stays usable and opens new ones when asked."""
        with self._changed:
            while self._idle:
                self._idle.pop().close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection() as connection:
                connection.execute(begin)
                try:
                    yield connection
                except BaseException:
                    if connection.in_transaction:  # a full disk makes SQLite roll back itself
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as e:
            raise LibraryError(
                f"the library's database {self.path} failed: {e}; if it is locked, another process "
                f"has been writing for over {BUSY_SECONDS:.0f} s, else check the disk"
            ) from e

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._pid != os.getpid():
            # A fork that ran no Python hooks. Closing what the parent had open would disturb
            # its locks, so these connections are kept, unused, for as long as we live.
            _INHERITED.extend(self._idle)
            self._fresh()
        with self._changed:
            self._changed.wait_for(lambda: not self._paused)
            self._busy += 1
            connection = self._idle.pop() if self._idle else None
        try:
            if connection is None:
                connection = self._open()
            yield connection
        finally:
            with self._changed:
                self._busy -= 1
                # A transaction that could not be ended would leak into the next one.
                if connection is not None and not connection.in_transaction:
                    self._idle.append(connection)
                elif connection is not None:
                    connection.close()
                self._changed.notify_all()

    def _open(self) -> sqlite3.Connection:
        # Switching a new file to WAL ignores the busy timeout, so openers take turns.
        with open(self._opening, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                connection.row_factory = sqlite3.Row
                self._check_schema(connection)
                connection.execute("PRAGMA journal_mode = WAL")
                # FULL, not NORMAL: a commit lost to a power cut would give a fencing token out
                # twice. Commits are rare here (a few per compiled kernel), so it costs little.
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
            except BaseException:
                connection.close()
                raise
            return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if owner != _APPLICATION_ID:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise LibraryError(
                    f"{self.path} is a database of something else; choose another folder"
                )
            version = 0
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise LibraryError(
                f"{self.path} has schema version {version}, this esper knows {SCHEMA_VERSION}; "
                "open it with a newer esper or choose another folder"
            )
        statements = _SCHEMA if version == 0 else itertools.chain.from_iterable(
            _MIGRATIONS[v] for v in range(version, SCHEMA_VERSION)
        )
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")

    def _pause(self) -> None:
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._busy)
            while self._idle:
                self._idle.pop().close()

    def _resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()


_STORES: weakref.WeakSet[Store] = weakref.WeakSet()
_INHERITED: list[sqlite3.Connection] = []
_forking = threading.Lock()
_held: list[Store] = []  # strong references, so that the same stores are resumed as paused


def _before_fork() -> None:
    _forking.acquire()
    _held.extend(_STORES)
    for store in _held:
        store._pause()


def _after_in_parent() -> None:
    for store in _held:
        store._resume()
    _held.clear()
    _forking.release()


def _after_in_child() -> None:
    global _forking
    for store in _held:
        store._fresh()  # another thread may have held the old lock when the fork happened
    _held.clear()
    _forking = threading.Lock()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
