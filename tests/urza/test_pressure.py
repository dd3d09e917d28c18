"""What the library does under pressure beyond the contract: kernels nobody can run, a store that
fails, databases of older versions."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

import pytest

from esper.errors import LibraryError, QueueFull, StaleClaim
from esper.leyline.artifact import Runtime
from esper.leyline.events import Priority
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.payloads import payload_of
from esper.urza import blobs
from esper.urza.library import LocalLibrary
from esper.urza.store import SCHEMA_VERSION
from tests.urza.support import OTHER, SIG, TOOLCHAIN, Clock, artifact, blueprint, report

OLD = Path(__file__).parent / "old"
HERE = Runtime(torch=TOOLCHAIN.torch, isas=(TOOLCHAIN.isa,))
ELSEWHERE = Runtime(torch="99.0", isas=(TOOLCHAIN.isa,))


def compiled(library: LocalLibrary, n: int, priority: Priority = Priority.NORMAL) -> str:
    library.submit(blueprint(n), SIG, author="karn", priority=priority)
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    return library.complete_blueprint(claim, artifact(claim.record.ir)).kernel_id


def test_kernels_that_nobody_can_run_do_not_clog_the_queue(tmp_path: Path) -> None:
    clock = Clock()
    library = LocalLibrary(tmp_path, clock)
    plain = compiled(library, 1)
    urgent = compiled(library, 2, Priority.EMERGENCY)
    clock.now += 3599
    assert library.claim_kernel("other", 60, ELSEWHERE) is None
    assert library.depths().tezzeret_to_urabrask == 2
    clock.now += 1
    assert library.claim_kernel("other", 60, ELSEWHERE) is None
    aside = library.kernel(plain)
    assert aside.status is KernelStatus.RETIRED and "no worker with torch 2.13" in aside.reason
    assert library.kernel(urgent).status is KernelStatus.PENDING_BENCHMARKING, "never dropped"
    taken = {c.record.kernel_id for _ in range(2) if (c := library.claim_kernel("w", 60, HERE))}
    assert taken == {plain, urgent}, "who can run it gets it back"
    # While somebody does run such kernels, a long queue of them is only a long queue.
    third = compiled(library, 3)
    clock.now += 3601
    fourth = compiled(library, 4)
    claim = library.claim_kernel("w", 60, HERE)
    assert claim is not None
    library.complete_kernel(claim, report(claim.record.kernel_id))
    assert library.claim_kernel("other", 60, ELSEWHERE) is None
    statuses = {library.kernel(k).status for k in (plain, urgent, third, fourth)}
    assert KernelStatus.RETIRED not in statuses


def test_a_store_that_keeps_failing_is_left_alone_and_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    library = LocalLibrary(tmp_path, clock)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 3600)
    assert claim is not None
    tries, full = [0], [True]
    fsync = blobs.os.fsync

    def on_a_full_disk(fd: int) -> None:
        tries[0] += 1
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(blobs.os, "fsync", on_a_full_disk)
    for n in range(1, 11):
        with pytest.raises(LibraryError, match="No space left"):
            library.complete_blueprint(claim, artifact(blueprint()))
        assert tries[0] == n
        clock.now += 5
    with pytest.raises(LibraryError, match=r"urza_storage: .* for 115 s"):
        library.complete_blueprint(claim, artifact(blueprint()))
    clock.now += 115
    with pytest.raises(LibraryError, match="No space left"):  # the probe
        library.complete_blueprint(claim, artifact(blueprint()))
    assert tries[0] == 11, "an open breaker keeps its hands off the disk"
    clock.now += 120
    full[0] = False
    assert library.complete_blueprint(claim, artifact(blueprint())).size > 0


def test_what_is_the_callers_fault_opens_no_breaker(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.release(claim)
    for _ in range(12):
        with pytest.raises(StaleClaim):
            library.complete_blueprint(claim, artifact(blueprint()))
    for n in range(2, 52):
        compiled(library, n)
    again = library.claim_blueprint("w", 60)
    assert again is not None
    for _ in range(12):
        with pytest.raises(QueueFull):
            library.complete_blueprint(again, artifact(again.record.ir))


def test_a_library_of_version_1_opens_with_all_it_had(tmp_path: Path) -> None:
    """Made by the last esper whose schema was version 1; its clock stood at 1000008."""
    shutil.copy(OLD / "library-v1.db", tmp_path / "library.db")
    clock = Clock()
    clock.now += 9
    library = LocalLibrary(tmp_path, clock)
    assert [b.status for b in library.blueprints()] == [
        BlueprintStatus.COMPILING, BlueprintStatus.INVALID, *[BlueprintStatus.COMPILED] * 3]
    pending, rejected, valid = library.kernels()
    assert [k.status for k in (pending, rejected, valid)] == [
        KernelStatus.PENDING_BENCHMARKING, KernelStatus.REJECTED, KernelStatus.VALIDATED]
    assert library.kernels(tags=["fast"]) == [valid] and valid.report is not None
    assert library.signatures() == [SIG] and len(library.ancestors(blueprint(3).id)) == 2
    work = library.claim_kernel("urabrask", 60, HERE)
    assert work is not None and work.record.kernel_id == pending.kernel_id
    library.complete_kernel(work, report(pending.kernel_id))
    for _ in range(5):  # the lease of whoever was killed at the time, and four more
        clock.now += 61
        claim = library.claim_blueprint("w", 60)
    assert claim is None and library.blueprints()[0].status is BlueprintStatus.INVALID
    library.submit(blueprint(9), OTHER, author="karn")
    library.close()
    with sqlite3.connect(tmp_path / "library.db") as con:
        assert con.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    con.close()
    assert len(LocalLibrary(tmp_path, clock).blueprints()) == 6, "and again, now up to date"


def test_a_library_of_version_2_keeps_events_from_now_on(tmp_path: Path) -> None:
    """Made by the last esper whose schema was version 2; its clock stood at 1000006."""
    shutil.copy(OLD / "library-v2.db", tmp_path / "library.db")
    clock = Clock()
    clock.now += 7
    library = LocalLibrary(tmp_path, clock)
    assert [b.status for b in library.blueprints()] == [
        BlueprintStatus.UNVALIDATED, BlueprintStatus.INVALID, *[BlueprintStatus.COMPILED] * 3]
    pending = library.kernels(status=KernelStatus.PENDING_BENCHMARKING)
    library.subscribe("watcher", frozenset())
    work = library.claim_kernel("urabrask", 60, HERE)
    assert work is not None and [work.record.kernel_id] == [k.kernel_id for k in pending]
    known = library.complete_kernel(work, report(work.record.kernel_id))
    said = library.next_event("watcher")
    assert said is not None and payload_of(said) == known


def test_what_waited_for_its_compile_does_not_begin_anew(tmp_path: Path) -> None:
    """Else an old background item would hold a compile worker at a full queue of kernels."""
    clock = Clock()
    library = LocalLibrary(tmp_path, clock)
    library.submit(blueprint(100), SIG, author="karn", priority=Priority.BACKGROUND)
    clock.now += 900
    old = library.claim_blueprint("tezzeret", 3600)
    for n in range(50):
        compiled(library, n + 1)
    assert old is not None
    with pytest.raises(QueueFull):
        library.submit(blueprint(101), SIG, author="karn")
        fresh = library.claim_blueprint("tezzeret", 60)
        assert fresh is not None
        library.complete_blueprint(fresh, artifact(fresh.record.ir))
    kernel = library.complete_blueprint(old, artifact(old.record.ir))
    first = library.claim_kernel("urabrask", 60)
    assert first is not None and first.record.kernel_id == kernel.kernel_id
