"""What every library promises, whatever it is made of; the backends are in conftest."""

from __future__ import annotations

import pytest

from esper.errors import (
    ArtifactCorrupt,
    ArtifactMismatch,
    ContractError,
    IllegalTransition,
    NotInLibrary,
    QueueFull,
    StaleClaim,
)
from esper.leyline.artifact import Pipeline, Runtime
from esper.leyline.base import sha256
from esper.leyline.command import FieldReport
from esper.leyline.events import Priority
from esper.leyline.library import KernelRecord, Library
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, SeedState
from tests.leyline.wire_samples import CONTEXT
from tests.urza.support import OTHER, SIG, Clock, artifact, blueprint, members, pack, report


def compiled(library: Library, n: int = 1, **how: object) -> KernelRecord:
    library.submit(blueprint(n), SIG, author="karn", **how)  # type: ignore[arg-type]
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    return library.complete_blueprint(claim, artifact(claim.record.ir))


def validated(library: Library, n: int = 1, *tags: str) -> KernelRecord:
    compiled(library, n)
    claim = library.claim_kernel("urabrask", 60)
    assert claim is not None
    return library.complete_kernel(claim, report(claim.record.kernel_id, *tags))


def test_it_satisfies_the_protocol(library: Library) -> None:
    assert isinstance(library, Library)


def test_signatures_are_kept_once_oldest_first(library: Library) -> None:
    for signature in (SIG, OTHER, SIG):
        library.register_signature(signature)
    assert library.signatures() == [SIG, OTHER]


def test_the_life_of_one_kernel(library: Library, clock: Clock) -> None:
    ir = blueprint()
    record = library.submit(ir, SIG, author="karn", parents=("bp-a", "bp-b"), interest=0.6)
    assert record.status is BlueprintStatus.UNVALIDATED and record.ir == ir
    assert (record.parents, record.interest, record.submitted) == (("bp-a", "bp-b"), 0.6, clock())
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None and claim.expires == clock() + 60 and claim.worker == "tezzeret"
    assert claim.record.status is BlueprintStatus.COMPILING
    data = artifact(ir)
    kernel = library.complete_blueprint(claim, data)
    assert kernel.status is KernelStatus.PENDING_BENCHMARKING
    assert (kernel.digest, kernel.size, kernel.blueprint_id) == (sha256(data), len(data), ir.id)
    assert library.fetch(kernel.digest).read_bytes() == data
    assert [b.status for b in library.blueprints(SIG)] == [BlueprintStatus.COMPILED]
    work = library.claim_kernel("urabrask", 60)
    assert work is not None and work.record.status is KernelStatus.BENCHMARKING
    done = library.complete_kernel(work, report(kernel.kernel_id, "low_memory"))
    assert done.status is KernelStatus.VALIDATED and done.report is not None
    assert library.kernel(kernel.kernel_id) == done
    assert library.claim_blueprint("w", 60) is None and library.claim_kernel("w", 60) is None


def test_submitting_again_returns_the_record_as_it_stands(library: Library, clock: Clock) -> None:
    first = library.submit(blueprint(), SIG, author="karn")
    clock.now += 5
    assert library.submit(blueprint(), SIG, author="else", interest=0.9) == first
    assert library.submit(blueprint(), OTHER, author="karn").signature == OTHER
    assert len(library.blueprints()) == 2 and library.blueprints(SIG) == [first]
    with pytest.raises(ContractError, match="interest"):
        library.submit(blueprint(2), SIG, author="karn", interest=float("nan"))


def test_claims_go_by_priority_then_interest_then_age(library: Library, clock: Clock) -> None:
    for n, (priority, interest) in enumerate(
        [(Priority.BACKGROUND, 0.5), (Priority.NORMAL, 0.2), (Priority.NORMAL, 0.7),
         (Priority.NORMAL, 0.2), (Priority.NORMAL, 0.9), (Priority.EMERGENCY, 0.0)], start=1
    ):
        library.submit(blueprint(n), SIG, author="karn", priority=priority, interest=interest)
        clock.now += 1
    order = []
    while claim := library.claim_blueprint("w", 60):
        order.append(claim.record.ir)
    assert order == [blueprint(n) for n in (6, 5, 3, 2, 4, 1)]


def test_waiting_raises_an_item_above_younger_ones(library: Library, clock: Clock) -> None:
    library.submit(blueprint(1), SIG, author="karn", priority=Priority.EXPERIMENTAL)
    clock.now += 600
    library.submit(blueprint(2), SIG, author="karn")
    claim = library.claim_blueprint("w", 60)
    assert claim is not None and claim.record.ir == blueprint(1)
    assert claim.record.priority is Priority.EXPERIMENTAL, "ageing is not written down"


def test_a_full_queue_drops_for_the_urgent_only_and_says_so(
    library: Library, clock: Clock
) -> None:
    for n in range(1, 101):
        library.submit(blueprint(n), SIG, author="karn", priority=Priority.EXPERIMENTAL)
        clock.now += 0.5
    with pytest.raises(QueueFull, match="karn_to_tezzeret"):
        library.submit(blueprint(200), SIG, author="karn", priority=Priority.EXPERIMENTAL)
    library.submit(blueprint(201), SIG, author="karn")
    library.submit(blueprint(202), SIG, author="karn", priority=Priority.EMERGENCY)
    assert library.depths().karn_to_tezzeret == 100 and library.capacity() == 0.1
    archived = [b for b in library.blueprints() if b.status is BlueprintStatus.ARCHIVED]
    assert [b.ir for b in archived] == [blueprint(100), blueprint(99)], "the youngest went first"
    assert "dropped" in archived[0].reason and len(library.blueprints()) == 102
    # What was dropped may be submitted again, as a new submission.
    claim = library.claim_blueprint("w", 60)
    assert claim is not None and claim.record.ir == blueprint(202)
    again = library.submit(blueprint(100), SIG, author="karn again")
    assert (again.status, again.author) == (BlueprintStatus.UNVALIDATED, "karn again")


def test_a_finished_compile_waits_at_a_full_queue_and_is_not_lost(
    library: Library, clock: Clock
) -> None:
    for n in range(1, 51):
        compiled(library, n)
    library.submit(blueprint(60), SIG, author="karn")
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    with pytest.raises(QueueFull, match="tezzeret_to_urabrask"):
        library.complete_blueprint(claim, artifact(blueprint(60)))
    library.heartbeat(claim, 60)
    assert compiled(library, 61, interest=0.9).status is KernelStatus.PENDING_BENCHMARKING
    (dropped,) = library.kernels(status=KernelStatus.RETIRED)
    assert "dropped" in dropped.reason
    assert library.claim_kernel("urabrask", 60) is not None
    kernel = library.complete_blueprint(claim, artifact(blueprint(60)))
    assert kernel.status is KernelStatus.PENDING_BENCHMARKING
    # The dropped kernel comes back by itself when the queue has drained.
    while (work := library.claim_kernel("urabrask", 60)) or library.depths().urabrask_validation:
        if work is not None:
            library.complete_kernel(work, report(work.record.kernel_id))
        else:
            clock.now += 61
    assert library.kernel(dropped.kernel_id).status is KernelStatus.VALIDATED


def test_no_more_kernels_are_validated_at_once_than_the_queue_holds(library: Library) -> None:
    for n in range(1, 28):
        compiled(library, n)
    claims = [library.claim_kernel("urabrask", 60) for _ in range(26)]
    assert claims[24] is not None and claims[25] is None
    assert library.depths().urabrask_validation == 25
    library.release(claims[0])  # type: ignore[arg-type]
    assert library.claim_kernel("urabrask", 60) is not None


def test_an_expired_lease_returns_its_item_and_fences_its_holder(
    library: Library, clock: Clock
) -> None:
    library.submit(blueprint(), SIG, author="karn")
    slow = library.claim_blueprint("slow", 10)
    assert slow is not None and library.claim_blueprint("w", 10) is None
    clock.now += 10
    with pytest.raises(StaleClaim, match="token 1"):  # over, even where nobody took it yet
        library.complete_blueprint(slow, artifact(blueprint()))
    quick = library.claim_blueprint("quick", 10)
    assert quick is not None and quick.token > slow.token and quick.record.ir == blueprint()
    for write in (
        lambda: library.complete_blueprint(slow, artifact(blueprint())),
        lambda: library.reject_blueprint(slow, "mine"),
        lambda: library.heartbeat(slow, 10),
        lambda: library.release(slow),
    ):
        with pytest.raises(StaleClaim):
            write()
    assert library.kernels() == []
    kernel = library.complete_blueprint(quick, artifact(blueprint()))
    with pytest.raises(StaleClaim):
        library.complete_blueprint(quick, artifact(blueprint()))
    first = library.claim_kernel("slow", 10)
    assert first is not None
    clock.now += 11
    second = library.claim_kernel("quick", 10)
    assert second is not None and second.token > first.token > quick.token
    with pytest.raises(StaleClaim):
        library.complete_kernel(first, report(kernel.kernel_id, accepted=False))
    assert library.kernel(kernel.kernel_id).report is None


def test_what_kills_its_workers_is_given_up_with_that_reason(
    library: Library, clock: Clock
) -> None:
    library.submit(blueprint(), SIG, author="karn")
    for _ in range(5):
        claim = library.claim_blueprint("doomed", 10)
        assert claim is not None
        clock.now += 11
    assert library.claim_blueprint("w", 10) is None
    (record,) = library.blueprints()
    assert record.status is BlueprintStatus.INVALID and "5 leases" in record.reason
    kernel = compiled(library, 2)
    for n in range(9):  # giving back is no attempt: the worker lives and says so
        work = library.claim_kernel("w", 10)
        assert work is not None
        if n % 2:
            library.release(work)
        else:
            clock.now += 11
    assert library.claim_kernel("w", 10) is None
    now = library.kernel(kernel.kernel_id)
    assert now.status is KernelStatus.REJECTED and "5 leases" in now.reason and now.report is None


def test_recompilation_is_background_work_and_leaves_its_blueprint_compiled(
    library: Library, clock: Clock
) -> None:
    ir = blueprint()
    library.submit(ir, SIG, author="karn", interest=0.9)
    assert library.claim_recompilation(ir.id, SIG, "w", 60) is None, "it was never compiled"
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact(ir))
    again = library.claim_recompilation(ir.id, SIG, "w", 60, Pipeline.AGGRESSIVE)
    assert again is not None and library.claim_recompilation(ir.id, SIG, "other", 60) is None
    assert again.record.pipeline is Pipeline.AGGRESSIVE
    assert again.record.priority is Priority.BACKGROUND
    library.reject_blueprint(again, "the compiler crashed")
    assert library.blueprints()[0].status is BlueprintStatus.COMPILED
    again = library.claim_recompilation(ir.id, SIG, "w", 60, Pipeline.AGGRESSIVE)
    assert again is not None
    better = library.complete_blueprint(again, artifact(ir, pipeline=Pipeline.AGGRESSIVE))
    first = compiled(library, 2)  # younger and less wanted, but a first compilation
    order = [library.claim_kernel("w", 60) for _ in range(3)]
    assert [c.record.kernel_id for c in order if c][1:] == [first.kernel_id, better.kernel_id]
    for _ in range(5):
        assert library.claim_recompilation(ir.id, SIG, "doomed", 10) is not None
        clock.now += 11
    assert library.claim_recompilation(ir.id, SIG, "w", 10) is None, "it kills its workers"
    assert {b.status for b in library.blueprints()} == {BlueprintStatus.COMPILED}
    with pytest.raises(NotInLibrary):
        library.claim_recompilation("bp-none", SIG, "w", 60)


def test_a_worker_is_given_only_kernels_that_it_can_run(library: Library) -> None:
    made = compiled(library).manifest.toolchain
    for other in (Runtime(torch="1.0", isas=(made.isa,)),
                  Runtime(torch=made.torch, isas=("AVX512", "sm_90"))):
        assert library.claim_kernel("w", 60, other) is None
    claim = library.claim_kernel("w", 60, Runtime(torch=made.torch, isas=("sm_90", made.isa)))
    assert claim is not None


def test_heartbeats_keep_a_lease_and_release_gives_it_back(library: Library, clock: Clock) -> None:
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 10)
    assert claim is not None
    for _ in range(3):
        clock.now += 9
        assert library.heartbeat(claim, 10) == clock() + 10
    library.release(claim)
    assert library.blueprints()[0].status is BlueprintStatus.UNVALIDATED
    assert library.claim_blueprint("w", 10) is not None
    with pytest.raises(ContractError, match="lease"):
        library.claim_blueprint("w", 0)


def test_a_rejected_blueprint_is_invalid_with_its_reason(library: Library) -> None:
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 10)
    assert claim is not None
    library.reject_blueprint(claim, "too deep")
    (record,) = library.blueprints()
    assert (record.status, record.reason) == (BlueprintStatus.INVALID, "too deep")
    assert library.submit(blueprint(), SIG, author="karn") == record


def test_a_false_artifact_is_refused_and_the_claim_stays(library: Library) -> None:
    ir = blueprint()
    library.submit(ir, SIG, author="karn")
    claim = library.claim_blueprint("w", 10)
    assert claim is not None
    good = members(ir)
    corrupt = {
        "no zip": b"PK nonsense",
        "a member too many": pack({**good, "evil.pkl": b""}),
        "compressed": pack(good, compression=8),
        "no manifest": pack({**good, "manifest.json": b"{}"}),
        "other code": pack({**good, "forward.so": b"tampered"}),
        "cut short": artifact(ir)[:-30],
        "another blueprint inside": pack(
            {**good, "blueprint.json": blueprint(2).to_json().encode()}
        ),
        "something behind the members": artifact(ir) + b"!",
        "parameters that are not its blueprint's": pack(
            {**good, "manifest.json": good["manifest.json"].replace(b'"down.weight"', b'"up"')}
        ),
        "a false id": pack(
            {**good, "manifest.json": good["manifest.json"].replace(b'"k-', b'"k-0')}
        ),
    }
    for name, data in corrupt.items():
        with pytest.raises(ArtifactCorrupt):
            library.complete_blueprint(claim, data)
            pytest.fail(name)
    for data in (artifact(blueprint(2)), artifact(ir, OTHER)):
        with pytest.raises(ArtifactMismatch):
            library.complete_blueprint(claim, data)
    assert library.kernels() == []
    library.complete_blueprint(claim, artifact(ir))


def test_kernels_are_found_by_signature_status_and_all_tags(library: Library, clock: Clock) -> None:
    fast = validated(library, 1, "fast", "low_memory")
    clock.now += 1
    lean = validated(library, 2, "low_memory")
    clock.now += 1
    fresh = compiled(library, 3)
    assert library.kernels() == [fresh, lean, fast]
    assert library.kernels(status=KernelStatus.VALIDATED, signature=SIG) == [lean, fast]
    assert library.kernels(tags=["low_memory"]) == [lean, fast]
    assert library.kernels(tags=["low_memory", "fast"]) == [fast]
    assert library.kernels(tags=["unheard_of"]) == library.kernels(signature=OTHER) == []


def test_unknown_things_are_named(library: Library) -> None:
    for digest in ("0" * 64, "../../library.db", ""):
        with pytest.raises(NotInLibrary):
            library.fetch(digest)
    with pytest.raises(NotInLibrary, match="k-none"):
        library.kernel("k-none")
    with pytest.raises(NotInLibrary):
        library.quarantine("k-none", "why")


def test_quarantine_follows_the_table_and_bears_repetition(library: Library) -> None:
    kernel = validated(library)
    library.quarantine(kernel.kernel_id, "NaN in the field")
    library.quarantine(kernel.kernel_id, "seen elsewhere too")
    now = library.kernel(kernel.kernel_id)
    assert (now.status, now.reason) == (KernelStatus.QUARANTINED, "NaN in the field")
    with pytest.raises(IllegalTransition):
        library.quarantine(compiled(library, 2).kernel_id, "never validated")


def test_field_reports_are_kept_once_oldest_first(library: Library) -> None:
    def field_report(name: str, time: float) -> FieldReport:
        return FieldReport(
            report_id=name, run_id="r", trace_id="t", site="s", kernel_id="k", blueprint_id="b",
            outcome=SeedState.CULLED, reason="no gain", epochs=3, time=time,
        )

    late, early = field_report("late", 2.0), field_report("early", 1.0)
    late = late.model_copy(update={"context": CONTEXT})
    for r in (late, early, late):
        library.add_report(r)
    assert library.reports() == [early, late]
