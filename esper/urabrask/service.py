"""The service: claims kernels, has each examined in a child process, reports the verdict.

The service itself never opens a kernel. A child that crashes, hangs or eats its memory is a
rejection with that reason, and the next kernel gets a fresh child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from esper.errors import ArtifactCorrupt, EsperError, LibraryError, NotInLibrary, StaleClaim
from esper.leyline.artifact import Runtime
from esper.leyline.library import KernelClaim, KernelRecord, Library
from esper.leyline.verdict import ValidationReport
from esper.oona.breaker import CircuitBreaker, Permit
from esper.oona.retry import PATIENCE_SECONDS, patiently
from esper.sandbox.allowance import Allowance, killed
from esper.sandbox.probe import allowed, available, describe
from esper.sandbox.watch import Watch, end_family, read_capped, read_tail
from esper.urabrask.child import Spec
from esper.urabrask.plan import QUICK, Plan
from esper.urabrask.runtime import runtime
from esper.urabrask.standing import Standing

log = logging.getLogger("esper.urabrask")
LEASE_SECONDS = 120.0
_SAME_STROKE_SECONDS = 0.5
# What is read back from a child. A report is some hundred kilobytes, all stages' names are one.
_MAX_REPORT_BYTES, _MAX_STAGES_BYTES, _MAX_STDERR_BYTES = 4 << 20, 1 << 16, 400


@dataclass(frozen=True)
class Limits:
    """What one examination may take."""

    deadline_seconds: float = 180.0  # for the proof, and again for the measurement
    plan: Plan = QUICK
    memory_bytes: int = 8 << 30

    def allowance(self) -> Allowance:
        # Where the deadline is a long one, as for a benchmark, processor time is no tighter.
        return Allowance(self.memory_bytes, cpu_seconds=max(900, int(2 * self.deadline_seconds)))


def run(
    library: Library,
    stop: threading.Event,
    *,
    worker_name: str,
    poll_seconds: float = 0.5,
    lease_seconds: float = LEASE_SECONDS,
    once: bool = False,
    limits: Limits | None = None,
    risk_file: Path | None = None,
) -> int:
    """Examine kernels until `stop` is set; with `once`, until none waits. Returns how many.

    Only kernels that this machine can run are claimed. Stopping ends a running examination and
    gives its kernel back. A library that fails is tried again; with `once` the error is raised.

    What a kernel does to its child is a verdict on the kernel. A child that ends before it has
    touched the kernel, or a disk with no room for its report, is a failure of this machine: the
    kernel goes back, and after three in five minutes none is claimed for half a minute, then
    one, as the probe (breaker urabrask_validation).

    The risk model, once it is fitted, is written to `risk_file` as JSON.
    """
    done = 0
    patience = 0.0 if once else PATIENCE_SECONDS
    breaker = CircuitBreaker("urabrask_validation")
    standing = Standing(library, risk_file)
    while not stop.is_set():
        if pause := breaker.retry_after():
            stop.wait(min(1.0, pause))
            continue
        try:
            here = _runtime(breaker)
            claim = library.claim_kernel(worker_name, lease_seconds, here)
            if claim is not None:
                done += _handle(
                    library, claim, stop, lease_seconds, limits or Limits(), breaker, patience,
                    standing,
                )
                continue
        except StaleClaim as e:
            log.warning("a lease ran out, the result is dropped: %s", e)
        except (EsperError, OSError) as e:
            if once:
                raise
            log.warning("trying again: %s", e)
        if once:
            break
        stop.wait(poll_seconds)
    return done


def _permit(breaker: CircuitBreaker) -> Permit:
    permit = breaker.acquire()
    assert permit is not None, "the time for it has come, and nobody else uses this breaker"
    return permit


def _runtime(breaker: CircuitBreaker) -> Runtime:
    """What this machine can run; a failure to find out counts like a child that cannot start."""
    if runtime.cache_info().currsize and available.cache_info().currsize:
        return runtime()
    with _permit(breaker):
        found = runtime()
        log.info("kernels are shut in: %s", describe(available()))
        return found


def handle(library: Library, claim: KernelClaim, stop: threading.Event) -> int:
    """What `run` does with one claim, for those who wait for just that; 1 if there is a verdict.

    Raises:
        EsperError: the library's or this machine's fault; the kernel was given back.
    """
    breaker = CircuitBreaker("urabrask_validation")
    return _handle(library, claim, stop, LEASE_SECONDS, Limits(), breaker, PATIENCE_SECONDS,
                   Standing(library))


def _handle(
    library: Library,
    claim: KernelClaim,
    stop: threading.Event,
    lease_seconds: float,
    limits: Limits,
    breaker: CircuitBreaker,
    patience: float,
    standing: Standing,
) -> int:
    record = claim.record
    lost = threading.Event()
    permit = _permit(breaker)
    with _heartbeat(library, claim, lease_seconds, lost):
        try:
            report = _examine_record(library, record, limits, (stop, lost))
            if report is not None and report.accepted:
                report = standing.place(record.manifest, report)
        except BaseException as e:
            if isinstance(e, Exception) and not isinstance(e, EsperError | OSError):
                # Nobody foresaw this. The lease is left to expire, which counts: given back, a
                # kernel that has this effect would be claimed for ever.
                raise
            # The store or the child's start failed, not the kernel: it goes back undone.
            if not isinstance(e, LibraryError):
                permit.failure()
            with contextlib.suppress(LibraryError):
                library.release(claim)
            raise
        finally:
            permit.success()  # counts only where no failure was reported
        if report is not None:
            finished = report
            patiently(lambda: library.complete_kernel(claim, finished), stop, patience)
    if report is None:
        if not lost.is_set():
            library.release(claim)
        return 0
    log.info(
        "kernel %s: %s%s",
        record.kernel_id,
        "VALIDATED" if report.accepted else "REJECTED",
        f" ({report.reason})" if report.reason else "",
    )
    return 1


def _examine_record(
    library: Library,
    record: KernelRecord,
    limits: Limits,
    give_up: tuple[threading.Event, ...],
) -> ValidationReport | None:
    try:
        path = library.fetch(record.digest)
    except (NotInLibrary, ArtifactCorrupt) as e:
        return _rejection(record.kernel_id, f"the library has no sound artifact of it: {e}", 0.0)
    return examine_file(path, record.kernel_id, record.digest, limits, give_up)


@contextlib.contextmanager
def _heartbeat(
    library: Library, claim: KernelClaim, lease_seconds: float, lost: threading.Event
) -> Iterator[None]:
    """Prolong the lease at a third of its length; sets `lost` when it is somebody else's."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(lease_seconds / 3):
            try:
                library.heartbeat(claim, lease_seconds)
            except StaleClaim:
                lost.set()
                return
            except LibraryError as e:  # two more tries before the lease is over
                log.warning("heartbeat failed: %s", e)

    thread = threading.Thread(target=beat, name="urabrask-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def examine_file(
    path: Path,
    kernel_id: str,
    digest: str,
    limits: Limits | None = None,
    give_up: tuple[threading.Event, ...] = (),
) -> ValidationReport | None:
    """Prove and then measure the artifact at `path`, each in a child process of its own.

    The report has no tags and no risk yet: these depend on what else is in the library.
    Returns None when one of `give_up` was set before there was a report.

    Raises:
        EsperError: a child ended before it touched the kernel.
    """
    limits = limits or Limits()
    proved = _in_child(path, kernel_id, digest, limits, give_up, None)
    if proved is None or not proved.accepted:
        return proved
    measured = _in_child(path, kernel_id, digest, limits, give_up, limits.plan)
    if measured is None:
        return None
    return measured.model_copy(
        update={"proof": proved.proof, "seconds": proved.seconds + measured.seconds}
    )


def _in_child(
    path: Path,
    kernel_id: str,
    digest: str,
    limits: Limits,
    give_up: tuple[threading.Event, ...],
    plan: Plan | None,
) -> ValidationReport | None:
    """One stage: the measurement where there is a `plan`, else the proof."""
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="esper-urabrask-") as base,
        _pipe() as (stages, stage),
    ):
        home = Path(base)
        scratch = home / "scratch"
        scratch.mkdir()
        spec = Spec(
            kernel_id=kernel_id,
            artifact=str(path.resolve()),
            digest=digest,
            report=str(scratch / "report.json"),
            stage=stage,
            folder=str(scratch),
            parent=os.getpid(),
            plan=plan,
            allowance=limits.allowance(),
            layers=allowed(),
        )
        how = _run_child(spec, home, limits.deadline_seconds, give_up)
        if how is None:
            return None
        seconds = time.monotonic() - start
        if how:
            shutil.rmtree(scratch, ignore_errors=True)  # what the kernel littered is its own fault
            _check_room(home)
        else:
            try:
                return ValidationReport.model_validate_json(
                    read_capped(Path(spec.report), _MAX_REPORT_BYTES)
                )
            except (OSError, ValidationError) as e:
                why = e if isinstance(e, OSError) else type(e).__name__
                how = f"left no readable report ({why})"
        during = _last_line(stages)
        said = read_tail(home / "stderr", _MAX_STDERR_BYTES).strip()
        if not during:
            raise EsperError(
                f"the process that was to examine kernel {kernel_id} {how} before it began; "
                f"check that this installation is complete: {said}"
            )
        reason = f"the process that ran it {how} during {during}"
        return _rejection(kernel_id, f"{reason}: {said}" if said else reason, seconds)


def _check_room(folder: Path) -> None:
    """Raise where a child may have failed because nothing can be written here.

    Raises:
        EsperError: the disk is full, or gone.
    """
    try:
        with (folder / "room").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise EsperError(
            f"nothing can be written below {folder} ({e}), so a failed examination says nothing "
            "about its kernel; free some space or set TMPDIR"
        ) from e


def _run_child(
    spec: Spec, home: Path, deadline_seconds: float, give_up: tuple[threading.Event, ...]
) -> str | None:
    """Returns "" for a clean end, None when told to give up, else how the child failed."""
    (home / "spec.json").write_text(spec.model_dump_json())
    # One thread, and nothing the kernel prints can be taken for a report.
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (home / "spec.json").open("rb") as stdin, (home / "stderr").open("wb") as stderr:
        # A group of its own so that all of it can be killed at once, but the parent's
        # session: idle priority counts only among processes of one session.
        child = subprocess.Popen(
            [sys.executable, "-m", "esper.urabrask.child"],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, **single},
            process_group=0,
            pass_fds=(spec.stage,),
        )
    verdict: str | None = ""
    watch = Watch(child.pid, spec.allowance, [Path(spec.folder)])
    try:
        while not _ended(child.pid):
            if any(event.is_set() for event in give_up):
                verdict = None
                break
            if watch.seconds() > deadline_seconds:
                verdict = f"did not finish within {deadline_seconds:g} s"
            verdict = verdict or watch.excess()
            if verdict:
                break
            time.sleep(0.02)
    finally:
        end_family(child.pid)
        code = child.wait()
    if verdict == "" and code:
        # Whoever ends this service may end all that it has started with the same stroke.
        if code < 0 and any(event.wait(_SAME_STROKE_SECONDS) for event in give_up):
            return None
        return killed(-code, spec.allowance) if code < 0 else f"exited with {code}"
    return verdict


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _last_line(pipe: int) -> str:
    os.set_blocking(pipe, False)
    try:
        lines = os.read(pipe, _MAX_STAGES_BYTES).decode(errors="replace").splitlines()
    except BlockingIOError:  # nothing was written
        return ""
    return lines[-1][:200] if lines else ""


def _ended(pid: int) -> bool:
    # WNOWAIT leaves the zombie in place, so that its process group cannot become another's
    # before the rest of the group is killed.
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _rejection(kernel_id: str, reason: str, seconds: float) -> ValidationReport:
    return ValidationReport(kernel_id=kernel_id, accepted=False, reason=reason, seconds=seconds)
