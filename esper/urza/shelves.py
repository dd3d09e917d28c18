"""The library's reading side, what comes back from the field, and a person's care for it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from esper.errors import ContractError, IllegalTransition, NotInLibrary
from esper.leyline.command import FieldReport
from esper.leyline.events import Event, Topic
from esper.leyline.library import BlueprintRecord, Change, KernelRecord, Lease, QueueDepths
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.payloads import LIBRARY_TOPICS, PAYLOADS, payload_of
from esper.leyline.signature import SiteSignature
from esper.oona.breaker import CircuitBreaker
from esper.oona.capacity import capacity
from esper.oona.queue import URZA_STORAGE
from esper.urza import interest, outbox, queues
from esper.urza.blobs import BlobFolder
from esper.urza.queues import BLUEPRINTS, KERNELS
from esper.urza.records import blueprint_record, change, kernel_record, lease
from esper.urza.store import Store


class Shelves:
    """Everything of `Library` that needs no lease."""

    def __init__(self, root: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(root)
        self._clock = clock
        self._store = Store(self.root / "library.db")
        self._blobs = BlobFolder(self.root / "blobs")
        self._breaker = CircuitBreaker(URZA_STORAGE, clock=clock)

    def close(self) -> None:
        """Close the database's idle connections."""
        self._store.close()

    # Looking things up

    def register_signature(self, signature: SiteSignature) -> None:
        with self._store.write() as con:
            con.execute(
                "INSERT OR IGNORE INTO signatures (signature_id, signature) VALUES (?, ?)",
                (signature.id, signature.model_dump_json()),
            )

    def signatures(self) -> list[SiteSignature]:
        with self._store.read() as con:
            rows = con.execute("SELECT signature FROM signatures ORDER BY seq").fetchall()
        return [SiteSignature.model_validate_json(r[0]) for r in rows]

    def blueprints(self, signature: SiteSignature | None = None) -> list[BlueprintRecord]:
        where = "" if signature is None else " WHERE signature_id = ?"
        given = () if signature is None else (signature.id,)
        query = f"SELECT * FROM blueprints{where} ORDER BY submitted DESC, seq DESC"
        with self._store.read() as con:
            rows = con.execute(query, given).fetchall()
        return [blueprint_record(r) for r in rows]

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        status: KernelStatus | None = None,
        tags: Iterable[str] = (),
    ) -> list[KernelRecord]:
        where: list[str] = []
        given: list[str] = []
        if signature is not None:
            where.append("signature_id = ?")
            given.append(signature.id)
        if status is not None:
            where.append("status = ?")
            given.append(status)
        for tag in tags:
            where.append("kernel_id IN (SELECT kernel_id FROM tags WHERE name = ?)")
            given.append(tag)
        query = "SELECT * FROM kernels" + (f" WHERE {' AND '.join(where)}" if where else "")
        with self._store.read() as con:
            rows = con.execute(query + " ORDER BY created DESC, seq DESC", given).fetchall()
        return [kernel_record(r) for r in rows]

    def kernel(self, kernel_id: str) -> KernelRecord:
        with self._store.read() as con:
            return kernel_record(self._kernel(con, kernel_id))

    def fetch(self, digest: str) -> Path:
        return self._blobs.path(digest)

    def ancestors(self, blueprint_id: str) -> list[str]:
        """Ids of all blueprints that this one descends from, nearest first.

        Ids that are only known as somebody's parent are among them.
        """
        with self._store.read() as con:
            rows = con.execute(
                "WITH RECURSIVE up (id, distance) AS (VALUES (:id, 0) UNION "
                "SELECT parent, distance + 1 FROM lineage JOIN up ON child = id "
                "WHERE distance < 1000) SELECT id FROM up WHERE id != :id "
                "GROUP BY id ORDER BY min(distance), id",
                {"id": blueprint_id},
            ).fetchall()
        return [r[0] for r in rows]

    def history(self, item_id: str) -> list[Change]:
        """Every change of status of a blueprint (for all its signatures) or kernel, oldest first.

        Raises:
            NotInLibrary: nothing of that id was ever here.
        """
        with self._store.read() as con:
            rows = con.execute(
                "SELECT * FROM events WHERE item = ? ORDER BY seq", (item_id,)
            ).fetchall()
        if not rows:
            raise NotInLibrary(f"no blueprint or kernel {item_id!r} in {self.root}")
        return [change(r) for r in rows]

    def changes(self, after: int | None = None, limit: int = 1000) -> list[Change]:
        """See `KeptLibrary`."""
        with self._store.read() as con:
            if after is None:
                rows = con.execute(
                    "SELECT * FROM events ORDER BY seq DESC LIMIT ?", (limit,)
                ).fetchall()[::-1]
            else:
                rows = con.execute(
                    "SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
                ).fetchall()
        return [change(r) for r in rows]

    # How full it is, and who works

    def leases(self) -> list[Lease]:
        """See `KeptLibrary`. One that is over and not swept yet is no longer among them."""
        with self._store.read() as con:
            rows = [
                row for line in (BLUEPRINTS, KERNELS) for row in con.execute(
                    f"SELECT * FROM {line.table} WHERE status = ? AND expires > ?",
                    (line.working, self._clock()),
                )
            ]
        return sorted((lease(r) for r in rows), key=lambda held: held.since)

    def depths(self) -> QueueDepths:
        """See `Library`. The first three count statuses as they stand; urza_storage counts the
        blobs being written at this moment by any process of this machine."""
        with self._store.read() as con:
            return QueueDepths(
                karn_to_tezzeret=queues.count(con, BLUEPRINTS, BLUEPRINTS.waiting),
                tezzeret_to_urabrask=queues.count(con, KERNELS, KERNELS.waiting),
                urabrask_validation=queues.count(con, KERNELS, KERNELS.working),
                urza_storage=self._blobs.writing(),
            )

    def capacity(self) -> float:
        return capacity(self.depths()).factor

    # From the field

    def quarantine(self, kernel_id: str, reason: str) -> None:
        """See `Library`. A second failure of a quarantined kernel changes nothing: several
        trainers may see the same one fail."""
        self._move(kernel_id, KernelStatus.VALIDATED, KernelStatus.QUARANTINED, reason)

    def add_report(self, report: FieldReport) -> None:
        """See `Library`, and `interest` for the rule."""
        with self._store.write() as con:
            made = con.execute(
                "INSERT OR IGNORE INTO reports (report_id, time, report) VALUES (?, ?, ?)",
                (report.report_id, report.time, report.model_dump_json()),
            )
            if made.rowcount:
                self._move_interest(con, report)
                outbox.say(con, Topic.FIELD_REPORTS, report, trace_id=report.trace_id,
                           now=self._clock())

    def _move_interest(self, con: sqlite3.Connection, report: FieldReport) -> None:
        row = con.execute(
            "SELECT seq, interest FROM blueprints JOIN (SELECT blueprint_id, signature_id "
            "FROM kernels WHERE kernel_id = ?) USING (blueprint_id, signature_id)",
            (report.kernel_id,),
        ).fetchone()
        if row is not None:
            con.execute(
                "UPDATE blueprints SET interest = ? WHERE seq = ?",
                (interest.after(row["interest"], report), row["seq"]),
            )

    def reports(self) -> list[FieldReport]:
        with self._store.read() as con:
            rows = con.execute("SELECT report FROM reports ORDER BY time, seq").fetchall()
        return [FieldReport.model_validate_json(r[0]) for r in rows]

    # Events (see `EventStore`)

    def publish(self, event: Event) -> None:
        if event.topic in LIBRARY_TOPICS:
            raise ContractError(f"{event.topic} is what the library says itself, when it happens")
        if event.topic in PAYLOADS:
            payload_of(event)
        if (size := len(event.model_dump_json())) > outbox.MAX_EVENT_CHARS:
            raise ContractError(
                f"event {event.event_id} has {size} characters, at most {outbox.MAX_EVENT_CHARS} "
                "are kept; say less, and where the rest is"
            )
        with self._store.read() as con:  # a commit is dear, and mostly nobody listens
            if not outbox.following(con, event.topic):
                return
        with self._store.write() as con:
            outbox.append(con, event, self._clock())

    def subscribe(self, name: str, topics: frozenset[Topic]) -> None:
        if not 0 < len(name) <= outbox.MAX_NAME:
            raise ContractError(
                f"a subscription has a name of 1 to {outbox.MAX_NAME} characters, its subscriber's "
                f"own; given {len(name)}"
            )
        with self._store.write() as con:
            outbox.subscribe(con, name, topics, self._clock())

    def next_event(self, name: str) -> Event | None:
        with self._store.read() as con:
            return outbox.first(con, name)

    def acknowledge(self, name: str, event_id: str) -> None:
        with self._store.write() as con:
            outbox.acknowledge(con, name, event_id)

    # Care (not part of `Library`)

    def reinstate(self, kernel_id: str, reason: str) -> None:
        """QUARANTINED -> VALIDATED, after somebody found the kernel innocent."""
        self._move(kernel_id, KernelStatus.QUARANTINED, KernelStatus.VALIDATED, reason)

    def retire(self, kernel_id: str, reason: str) -> None:
        """QUARANTINED -> RETIRED, for good."""
        self._move(kernel_id, KernelStatus.QUARANTINED, KernelStatus.RETIRED, reason)

    def archive(self, blueprint_id: str, signature: SiteSignature, reason: str) -> None:
        """Take a blueprint out for good; a claim on it becomes stale. Its kernels stay."""
        with self._store.write() as con:
            row = con.execute(
                "SELECT seq FROM blueprints WHERE blueprint_id = ? AND signature_id = ?",
                (blueprint_id, signature.id),
            ).fetchone()
            if row is None:
                raise NotInLibrary(f"no blueprint {blueprint_id} for {signature} in {self.root}")
            queues.move(con, BLUEPRINTS, row["seq"], BLUEPRINTS.dropped, reason, self._clock())

    def orphans(self) -> set[str]:
        """Digests of blobs that no kernel names: a crash between blob and record leaves one, and
        one that is being stored right now looks the same. Nothing is deleted."""
        with self._store.read() as con:
            named = {r[0] for r in con.execute("SELECT digest FROM kernels")}
        return self._blobs.digests() - named

    def _find(self, con: sqlite3.Connection, kernel_id: str) -> sqlite3.Row | None:
        query = "SELECT * FROM kernels WHERE kernel_id = ?"
        row: sqlite3.Row | None = con.execute(query, (kernel_id,)).fetchone()
        return row

    def _kernel(self, con: sqlite3.Connection, kernel_id: str) -> sqlite3.Row:
        row = self._find(con, kernel_id)
        if row is None:
            raise NotInLibrary(
                f"no kernel {kernel_id!r} in {self.root}; kernels() lists those there are"
            )
        return row

    def _move(
        self, kernel_id: str, before: KernelStatus, after: KernelStatus, reason: str
    ) -> None:
        """Do nothing where the kernel is `after` already.

        `before` is asked for by name: the table also has transitions to `after` that only the
        holder of a lease may make.
        """
        with self._store.write() as con:
            row = self._kernel(con, kernel_id)
            if row["status"] == after:
                return
            if row["status"] != before:
                raise IllegalTransition(
                    f"kernel {kernel_id} is {row['status']}; only a {before} one becomes {after} "
                    "this way"
                )
            queues.move(con, KERNELS, row["seq"], after, reason, self._clock())
