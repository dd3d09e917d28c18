"""The local library: SQLite for what is known, a folder of blobs for what is compiled.

`LocalLibrary` is `esper.leyline.library.Library` on one machine. Any number of processes may
open one folder at the same time. Locks are the database's own; a method is one transaction,
and `complete_blueprint` stores the blob before it, so that a crash leaves at worst a blob that
no record names (see `orphans`). This file holds what works under leases; `shelves` the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from esper.errors import ContractError, LibraryError, NotInLibrary, QueueFull, StaleClaim
from esper.leyline.artifact import Manifest, Pipeline, Runtime
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.events import Priority, Topic
from esper.leyline.library import (
    BlueprintClaim,
    BlueprintRecord,
    KernelClaim,
    KernelRecord,
)
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.payloads import pipeline_trace
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.oona.queue import (
    LIMITS,
    MAX_ATTEMPTS,
    URABRASK_VALIDATION,
    URZA_STORAGE,
    Item,
    lifted,
)
from esper.urza import outbox, queues
from esper.urza.intake import check_artifact
from esper.urza.queues import BLUEPRINTS, KERNELS, Line
from esper.urza.records import blueprint_record, kernel_record
from esper.urza.shelves import Shelves

Claim = BlueprintClaim | KernelClaim


def _line(claim: Claim) -> tuple[Line, tuple[str, ...]]:
    if isinstance(claim, BlueprintClaim):
        return BLUEPRINTS, (claim.record.blueprint_id, claim.record.signature.id)
    return KERNELS, (claim.record.kernel_id,)


class LocalLibrary(Shelves):
    """Urza in a folder. See `Library` for the contract of its methods.

    Decisions that the contract leaves open:
    - A blueprint that was dropped from a full queue is ARCHIVED and may be submitted again, as
      a new submission; one that was archived by a person stays archived.
    - A compiled kernel that was dropped is RETIRED, and the library brings it back by itself
      (see `oona.queue.may_return`). No compilation is lost.
    - A kernel has the age of its blueprint: what has waited for its compile does not begin anew.
    - An item whose lease expires was admitted before, so it returns even to a full queue.
    - A kernel that no worker could run for an hour is RETIRED as if dropped, and comes back
      when a worker asks that can.
    - A store that fails ten times in five minutes is left alone for two; `complete_blueprint`
      raises `LibraryError` meanwhile and touches nothing (breaker urza_storage).

    Args:
        root: the folder; created where it is missing.
        clock: UTC seconds, the same for every process that opens the folder.
    """

    # Submissions

    def submit(
        self,
        ir: BlueprintIR,
        signature: SiteSignature,
        *,
        author: str,
        interest: float = 0.5,
        priority: Priority = Priority.NORMAL,
        parents: tuple[str, ...] = (),
        pipeline: Pipeline | None = None,
    ) -> BlueprintRecord:
        if not (math.isfinite(interest) and 0 <= interest <= 1):
            raise ContractError(f"interest is between 0 and 1, given {interest}")
        key = (ir.id, signature.id)
        priority = lifted(priority, interest)
        with self._store.write() as con:
            now = self._clock()
            queues.sweep(con, BLUEPRINTS, now)
            find = "SELECT * FROM blueprints WHERE blueprint_id = ? AND signature_id = ?"
            row = con.execute(find, key).fetchone()
            if row is not None and not row["shed"]:
                return blueprint_record(row)
            arrival = queues.arrival(priority, now, interest)
            queues.make_room(con, BLUEPRINTS, arrival, now)
            con.executemany(
                "INSERT OR IGNORE INTO lineage (child, parent) VALUES (?, ?)",
                [(ir.id, parent) for parent in parents],
            )
            words = {
                "author": author, "parents": json.dumps(parents), "pipeline": pipeline,
                "submitted": now, "priority": int(priority), "interest": interest, "queued": now,
            }
            if row is not None:
                queues.move(con, BLUEPRINTS, row["seq"], BLUEPRINTS.waiting, "", now)
                con.execute(
                    f"UPDATE blueprints SET {', '.join(f'{w} = ?' for w in words)} WHERE seq = ?",
                    (*words.values(), row["seq"]),
                )
            else:
                words |= {
                    "blueprint_id": key[0], "signature_id": key[1], "ir": ir.to_json(),
                    "signature": signature.model_dump_json(), "status": BLUEPRINTS.waiting,
                    "updated": now,
                }
                made = con.execute(
                    f"INSERT INTO blueprints ({', '.join(words)}) "
                    f"VALUES ({', '.join('?' * len(words))})",
                    tuple(words.values()),
                )
                queues.born(con, BLUEPRINTS, int(made.lastrowid or 0), now, f"submitted: {author}")
            record = blueprint_record(con.execute(find, key).fetchone())
            outbox.say(con, Topic.BLUEPRINT_SUBMITTED, record, trace_id=pipeline_trace(*key),
                       priority=priority, now=now)
            return record

    # Tezzeret's side

    def claim_blueprint(
        self, worker: str, lease_seconds: float, leave: Collection[tuple[str, str]] = ()
    ) -> BlueprintClaim | None:
        queues.check_lease(lease_seconds)
        with self._store.write() as con:
            now = self._clock()
            queues.sweep(con, BLUEPRINTS, now)
            item = queues.first(con, BLUEPRINTS, now, leave=leave)
            if item is None:
                return None
            lease = queues.lease(con, BLUEPRINTS, item.key, worker, lease_seconds, now)
            row = con.execute("SELECT * FROM blueprints WHERE seq = ?", (lease.seq,)).fetchone()
            record = blueprint_record(row)
        return BlueprintClaim(
            record=record, worker=worker, token=lease.token, expires=lease.expires
        )

    def claim_recompilation(
        self,
        blueprint_id: str,
        signature: SiteSignature,
        worker: str,
        lease_seconds: float,
        pipeline: Pipeline | None = None,
    ) -> BlueprintClaim | None:
        queues.check_lease(lease_seconds)
        with self._store.write() as con:
            now = self._clock()
            queues.sweep(con, BLUEPRINTS, now)
            find = "SELECT * FROM blueprints WHERE blueprint_id = ? AND signature_id = ?"
            row = con.execute(find, (blueprint_id, signature.id)).fetchone()
            if row is None:
                raise NotInLibrary(f"no blueprint {blueprint_id} for {signature}; submit it first")
            if row["status"] != BlueprintStatus.COMPILED or row["attempts"] >= MAX_ATTEMPTS:
                return None
            lease = queues.lease(con, BLUEPRINTS, row["seq"], worker, lease_seconds, now)
            record = blueprint_record(con.execute(find, (blueprint_id, signature.id)).fetchone())
        return BlueprintClaim(
            record=record.model_copy(
                update={"pipeline": pipeline, "priority": Priority.BACKGROUND}
            ),
            worker=worker, token=lease.token, expires=lease.expires,
        )

    def complete_blueprint(self, claim: BlueprintClaim, artifact: bytes) -> KernelRecord:
        """See `Library`. On `QueueFull` nothing is lost: the claim still holds, so the worker
        keeps the artifact, prolongs its lease by `heartbeat` and tries again.

        Raises:
            ArtifactCorrupt, ArtifactMismatch: the artifact is not a kernel of this claim.
        """
        manifest = check_artifact(artifact, claim.record)
        line, key = _line(claim)
        with self._store.read() as con:  # refuse before the blob is written, where possible
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            kernel = queues.arrival(Priority(row["priority"]), row["queued"], row["interest"])
            if row["returns_to"] == BlueprintStatus.COMPILED:  # recompilation is maintenance
                kernel = replace(kernel, priority=Priority.BACKGROUND, since=now)
            if self._find(con, manifest.kernel_id) is None:
                queues.make_room(con, KERNELS, kernel, now, act=False)
        full = self._blobs.writing() >= LIMITS[URZA_STORAGE]
        if full and kernel.priority is not Priority.EMERGENCY:
            raise QueueFull(
                f"{URZA_STORAGE}: {LIMITS[URZA_STORAGE]} blobs are being written; try again soon"
            )
        with self._through_the_breaker():
            digest = self._blobs.put(artifact)
            return self._record_kernel(claim, manifest, digest, len(artifact), kernel)

    @contextmanager
    def _through_the_breaker(self) -> Iterator[None]:
        """Leave a store alone that keeps failing; only failures of the store itself count."""
        permit = self._breaker.acquire()
        if permit is None:
            raise LibraryError(
                f"{URZA_STORAGE}: storing has failed over and over and is not tried again for "
                f"{self._breaker.retry_after():.0f} s; keep the artifact and try then, and look "
                f"after the disk below {self.root}"
            )
        try:
            yield
        except (StaleClaim, NotInLibrary):
            raise
        except LibraryError:
            permit.failure()
            raise
        finally:
            permit.success()  # counts only where nothing was reported yet

    def _record_kernel(
        self, claim: BlueprintClaim, manifest: Manifest, digest: str, size: int, kernel: Item[int]
    ) -> KernelRecord:
        """The kernel's row and its blueprint's; it comes at the priority and age of `kernel`."""
        line, key = _line(claim)
        with self._store.write() as con:
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            known = self._find(con, manifest.kernel_id)
            if known is None:
                queues.sweep(con, KERNELS, now)
                queues.make_room(con, KERNELS, kernel, now)
                made = con.execute(
                    "INSERT INTO kernels (kernel_id, blueprint_id, signature_id, manifest, digest, "
                    "size, created, priority, interest, queued, status, updated) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (manifest.kernel_id, *key, manifest.model_dump_json(), digest, size, now,
                     int(kernel.priority), kernel.interest, kernel.since, KERNELS.waiting, now),
                )
                queues.born(
                    con, KERNELS, int(made.lastrowid or 0), now, f"compiled by {claim.worker}"
                )
                known = self._kernel(con, manifest.kernel_id)
                outbox.say(con, Topic.KERNEL_READY, kernel_record(known),
                           trace_id=pipeline_trace(*key), priority=kernel.priority, now=now)
            # A kernel that is there already keeps its artifact and status: its id says that the
            # code is the same, and what was proved and measured was the stored one.
            queues.move(
                con, line, row["seq"], BlueprintStatus.COMPILED, f"kernel {manifest.kernel_id}", now
            )
            con.execute("UPDATE blueprints SET attempts = 0 WHERE seq = ?", (row["seq"],))
            return kernel_record(known)

    def reject_blueprint(self, claim: BlueprintClaim, reason: str) -> None:
        line, key = _line(claim)
        with self._store.write() as con:
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            recompiled = row["returns_to"] == BlueprintStatus.COMPILED
            after = BlueprintStatus.COMPILED if recompiled else BlueprintStatus.INVALID
            queues.move(con, line, row["seq"], after, reason, now)

    # Urabrask's side

    def claim_kernel(
        self, worker: str, lease_seconds: float, runtime: Runtime | None = None
    ) -> KernelClaim | None:
        """See `Library`. Also None where as many kernels are being validated as the queue
        urabrask_validation holds, unless an emergency waits."""
        queues.check_lease(lease_seconds)
        with self._store.write() as con:
            now = self._clock()
            queues.sweep(con, KERNELS, now)
            if runtime is not None:
                queues.set_aside(con, runtime, now)
            queues.readmit(con, KERNELS, now, runtime)
            item = queues.first(con, KERNELS, now, runtime)
            running = queues.count(con, KERNELS, KERNELS.working)
            if item is None or (
                running >= LIMITS[URABRASK_VALIDATION] and item.priority != Priority.EMERGENCY
            ):
                return None
            lease = queues.lease(con, KERNELS, item.key, worker, lease_seconds, now)
            queues.readmit(con, KERNELS, now, runtime)  # before an arrival takes the place
            row = con.execute("SELECT * FROM kernels WHERE seq = ?", (lease.seq,)).fetchone()
            record = kernel_record(row)
        return KernelClaim(record=record, worker=worker, token=lease.token, expires=lease.expires)

    def complete_kernel(self, claim: KernelClaim, report: ValidationReport) -> KernelRecord:
        if report.kernel_id != claim.record.kernel_id:
            raise ContractError(
                f"the report is on {report.kernel_id}, the claim on {claim.record.kernel_id}"
            )
        line, key = _line(claim)
        after = KernelStatus.VALIDATED if report.accepted else KernelStatus.REJECTED
        with self._store.write() as con:
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            queues.move(con, line, row["seq"], after, report.reason, now)
            con.execute(
                "UPDATE kernels SET report = ? WHERE seq = ?",
                (report.model_dump_json(), row["seq"]),
            )
            con.execute("DELETE FROM tags WHERE kernel_id = ?", key)
            con.executemany(
                "INSERT OR IGNORE INTO tags (name, kernel_id) VALUES (?, ?)",
                [(tag.name, key[0]) for tag in report.tags],
            )
            record = kernel_record(self._kernel(con, key[0]))
            trace = pipeline_trace(row["blueprint_id"], row["signature_id"])
            outbox.say(con, Topic.KERNEL_CHARACTERIZED, record, trace_id=trace,
                       priority=Priority(row["priority"]), now=now)
            return record

    # Leases

    def heartbeat(self, claim: Claim, lease_seconds: float) -> float:
        queues.check_lease(lease_seconds)
        line, key = _line(claim)
        with self._store.write() as con:
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            con.execute(
                f"UPDATE {line.table} SET expires = ? WHERE seq = ?",
                (now + lease_seconds, row["seq"]),
            )
        return now + lease_seconds

    def release(self, claim: Claim) -> None:
        line, key = _line(claim)
        with self._store.write() as con:
            now = self._clock()
            row = queues.held(con, line, key, claim.token, now)
            back = line.status(row, "returns_to")
            queues.move(con, line, row["seq"], back, f"released by {claim.worker}", now)

    def sweep(self) -> int:
        """Return every item whose lease is over now (claims do so too); how many there were."""
        with self._store.write() as con:
            now = self._clock()
            return sum(queues.sweep(con, line, now) for line in (BLUEPRINTS, KERNELS))
