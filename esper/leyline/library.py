"""The interface of Urza, and the records it keeps.

Every other room sees the library through `Library`; the local object and a remote client
both satisfy it, so a service runs in the trainer's process or anywhere else unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from esper.leyline.artifact import Manifest, Pipeline, Runtime
from esper.leyline.base import Contract
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.command import FieldReport
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport

HIGH_INTEREST = 0.7  # above it, a blueprint is worth Tezzeret's most


class BlueprintRecord(Contract):
    """One blueprint for one signature: (blueprint_id, signature.id) is its key.

    `interest` in [0, 1] says how much somebody waits for it: its author's guess at first, then
    what field reports make of it. Above `HIGH_INTEREST` it is compiled AGGRESSIVE where there is
    time for that; new work above 0.8 is strategic.
    `pipeline` is the one asked for, None where Tezzeret chooses. Times are UTC seconds.
    """

    blueprint_id: str
    signature: SiteSignature
    ir: BlueprintIR
    author: str
    parents: tuple[str, ...] = ()
    interest: float
    priority: Priority
    pipeline: Pipeline | None = None
    status: BlueprintStatus
    reason: str = ""
    submitted: float
    updated: float


class KernelRecord(Contract):
    """One compiled kernel. `digest` is the SHA-256 of the artifact file, its blob's name."""

    kernel_id: str
    blueprint_id: str
    manifest: Manifest
    digest: str
    size: int
    status: KernelStatus
    reason: str = ""
    report: ValidationReport | None = None
    created: float
    updated: float


class BlueprintClaim(Contract):
    """A lease on a blueprint; `token` fences off whoever held it before."""

    record: BlueprintRecord
    worker: str
    token: int
    expires: float


class KernelClaim(Contract):
    """A lease on a kernel; `token` fences off whoever held it before."""

    record: KernelRecord
    worker: str
    token: int
    expires: float


class QueueDepths(Contract):
    """How many items wait in each queue of section 6.3.1, by the queue's name."""

    karn_to_tezzeret: int
    tezzeret_to_urabrask: int
    urabrask_validation: int
    urza_storage: int


class Lease(Contract):
    """Who works on what: `item` is the id of a blueprint or a kernel. UTC seconds."""

    item: str
    signature: SiteSignature
    worker: str
    since: float
    expires: float


class Change(Contract):
    """One change of status in an item's history. `before` is None where it came into being.

    `sequence` grows from one change to the next, over all items of a library.
    """

    sequence: int
    time: float
    item: str
    signature_id: str
    before: str | None
    after: str
    reason: str


@runtime_checkable
class Library(Protocol):
    """Safe to call from several threads and processes. Every call is one transaction.

    Raises `NotInLibrary` for unknown ids, `StaleClaim` when a claim's lease is over (nothing
    is written then), `QueueFull` when an arrival is refused, `IllegalTransition`, and
    `LibraryError` where the store itself fails.

    An item whose lease expires goes back to where it was, at the age it has. When that has
    happened five times, the item is taken for what kills its workers: it becomes INVALID or
    REJECTED with that reason.
    """

    def register_signature(self, signature: SiteSignature) -> None:
        """Say that kernels for `signature` are wanted. Idempotent."""

    def signatures(self) -> list[SiteSignature]:
        """All registered signatures, oldest first."""

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
        """Queue a blueprint. One that is there already is returned as it stands."""

    def claim_blueprint(
        self, worker: str, lease_seconds: float, leave: Collection[tuple[str, str]] = ()
    ) -> BlueprintClaim | None:
        """Lease the most urgent UNVALIDATED blueprint, or None. It becomes COMPILING. None of
        `leave` is handed out, (blueprint id, signature id) each: what this worker cannot compile
        and another may be able to."""

    def claim_recompilation(
        self,
        blueprint_id: str,
        signature: SiteSignature,
        worker: str,
        lease_seconds: float,
        pipeline: Pipeline | None = None,
    ) -> BlueprintClaim | None:
        """Lease a COMPILED blueprint to compile it anew, None where it is not COMPILED now or
        has cost too many workers. The claim's record carries `pipeline`, and BACKGROUND as its
        priority, which its kernel will have. A rejected or expired claim leaves it COMPILED."""

    def complete_blueprint(self, claim: BlueprintClaim, artifact: bytes) -> KernelRecord:
        """Store the artifact; blueprint COMPILED, kernel PENDING_BENCHMARKING, atomically."""

    def reject_blueprint(self, claim: BlueprintClaim, reason: str) -> None:
        """COMPILING -> INVALID (or back to COMPILED where a recompilation failed)."""

    def claim_kernel(
        self, worker: str, lease_seconds: float, runtime: Runtime | None = None
    ) -> KernelClaim | None:
        """Lease the most urgent PENDING_BENCHMARKING kernel; it becomes BENCHMARKING. Where
        `runtime` is given, only one that it can run."""

    def complete_kernel(self, claim: KernelClaim, report: ValidationReport) -> KernelRecord:
        """BENCHMARKING -> VALIDATED or REJECTED by `report.accepted`; stores the report."""

    def heartbeat(
        self, claim: BlueprintClaim | KernelClaim, lease_seconds: float
    ) -> float:
        """Prolong the lease; returns when it now ends."""

    def release(self, claim: BlueprintClaim | KernelClaim) -> None:
        """Give the item back to where it was, undone."""

    def blueprints(self, signature: SiteSignature | None = None) -> list[BlueprintRecord]:
        """All blueprints, newest first; only those for `signature` where one is given."""

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        status: KernelStatus | None = None,
        tags: Iterable[str] = (),
    ) -> list[KernelRecord]:
        """Kernels that match all that is given, newest first; `tags` must all be present."""

    def kernel(self, kernel_id: str) -> KernelRecord:
        """One kernel by id."""

    def fetch(self, digest: str) -> Path:
        """A local, read-only file whose content has this SHA-256 (the caller checks again)."""

    def quarantine(self, kernel_id: str, reason: str) -> None:
        """VALIDATED -> QUARANTINED after a failure in the field."""

    def add_report(self, report: FieldReport) -> None:
        """Keep a field report, once for each report_id. It moves the interest in the blueprint
        of its kernel, for that kernel's signature: up where a seed fossilized with a gain, down
        where it was culled, within [0, 1]. A kernel that is not here moves nothing."""

    def reports(self) -> list[FieldReport]:
        """All field reports, oldest first."""

    def depths(self) -> QueueDepths:
        """How many items wait in each queue now."""

    def capacity(self) -> float:
        """The capacity factor of section 6.3.4, from the fullest queue: 1.0 down to 0.1."""


class KeptLibrary(Library, Protocol):
    """A library and what people do with it besides.

    Raises what `Library` raises.
    """

    def leases(self) -> list[Lease]:
        """Everything that is being worked on now, the longest held first."""

    def changes(self, after: int | None = None, limit: int = 1000) -> list[Change]:
        """At most `limit` changes after the one numbered `after`, oldest first; without
        `after` the newest ones there are."""

    def archive(self, blueprint_id: str, signature: SiteSignature, reason: str) -> None:
        """Take a blueprint out for good; a claim on it becomes stale. Its kernels stay."""

    def retire(self, kernel_id: str, reason: str) -> None:
        """QUARANTINED -> RETIRED, for good."""

    def close(self) -> None:
        """Close connections; what is open elsewhere stays."""


@runtime_checkable
class Publishing(Protocol):
    """A library that passes events on to who subscribed to them."""

    def publish(self, event: Event) -> None:
        """Keep `event` for every subscription that wants it, durably before this returns.

        Raises:
            ContractError: a topic that the library speaks of itself, or a body that breaks its
                topic's contract.
        """


class EventStore(Publishing, Protocol):
    """Events, each kept for a subscriber until he says that its work is done.

    What is acknowledged is gone for that subscriber; what is not comes again, also after the
    process that keeps the library was killed. So consumers are idempotent, by event_id.
    """

    def subscribe(self, name: str, topics: frozenset[Topic]) -> None:
        """Keep the events of `topics` (none: of all) for `name` from now on; those kept before
        stay, if the topics are the same. A subscription that nobody opens for a day is dropped.

        Raises:
            QueueFull: there are as many subscriptions as there may be.
        """

    def next_event(self, name: str) -> Event | None:
        """The most urgent event that `name` has not acknowledged, of several the oldest.

        Raises:
            NotInLibrary: no such subscription.
        """

    def acknowledge(self, name: str, event_id: str) -> None:
        """The work on that event is done. Doing it again changes nothing."""


class ServedLibrary(KeptLibrary, EventStore, Protocol):
    """What a server needs of a library."""
