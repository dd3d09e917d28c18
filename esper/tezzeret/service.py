"""Tezzeret's loop: claim, analyse, compile, hand over."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator

from esper.errors import (
    ArtifactCorrupt,
    BlueprintError,
    CompileError,
    EsperError,
    LibraryError,
    NoBackend,
    NotInLibrary,
    QueueFull,
    StaleClaim,
)
from esper.leyline.artifact import Pipeline, kernel_id
from esper.leyline.library import BlueprintClaim, Library
from esper.oona.breaker import BreakerState, CircuitBreaker
from esper.oona.queue import KARN_TO_TEZZERET, LIMITS
from esper.oona.retry import PATIENCE_SECONDS, patiently
from esper.tezzeret.analysis import analyse
from esper.tezzeret.control import control_error
from esper.tezzeret.idle import claim_idle_work
from esper.tezzeret.pipelines import choose_pipeline
from esper.tezzeret.worker import Forge
from esper.tezzeret.workshop import backend_for, backends, toolchain_for

log = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
IDLE_SECONDS = 10.0  # without new work, before old kernels are looked at, and between two looks
LIBRARY_PAUSE_SECONDS = 5.0  # after a library that did not answer
# Blueprints left to other workers, of which the latest are remembered: more than wait at a time.
LEFT_BEHIND = 256


@contextlib.contextmanager
def _kept_alive(library: Library, claim: BlueprintClaim) -> Iterator[None]:
    """Prolong the lease from a thread for as long as the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LEASE_SECONDS / 4):
            try:
                library.heartbeat(claim, LEASE_SECONDS)
            except StaleClaim:
                log.warning("the lease on %s is lost", claim.record.blueprint_id)
                return
            except EsperError:
                log.warning("no heartbeat for %s", claim.record.blueprint_id, exc_info=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _carry(
    library: Library, claim: BlueprintClaim, forge: Forge, stop: threading.Event,
    pipeline: Pipeline | None, patience: float,
) -> str:
    """Bring one claimed blueprint to its end; returns what became of it, for the log.

    Raises:
        NoBackend: nothing here compiles it, which is not its fault.
    """
    record = claim.record
    load = library.depths().karn_to_tezzeret / LIMITS[KARN_TO_TEZZERET]
    chosen = pipeline or record.pipeline or choose_pipeline(record.interest, load)
    try:
        analyse(record.ir, record.signature)
    except BlueprintError as e:
        reason = str(e)
        patiently(lambda: library.reject_blueprint(claim, reason), stop, patience)
        return f"refused: {reason}"
    tools = backend_for(record.ir, record.signature).toolchain()
    identity = kernel_id(record.blueprint_id, record.signature, tools, chosen)
    # One that is there but damaged is compiled anew.
    with contextlib.suppress(NotInLibrary, ArtifactCorrupt):
        known = library.kernel(identity)
        # Released it would come straight back; completed with what is there it is done.
        library.complete_blueprint(claim, library.fetch(known.digest).read_bytes())
        return f"is in the library already: {identity}"
    artifact = forge.compile(record.ir, record.signature, chosen, cancelled=stop.is_set)
    # It was dear to make, so a full queue or a failing store is waited for.
    kernel = patiently(lambda: library.complete_blueprint(claim, artifact), stop, patience)
    return f"{chosen} kernel {kernel.kernel_id} in {kernel.manifest.compile_seconds:.1f} s"


class _ToolchainBroken(CompileError):
    """Not even the control compiles."""


def _serve(
    library: Library, claim: BlueprintClaim, forge: Forge, stop: threading.Event,
    pipeline: Pipeline | None, patience: float,
) -> str:
    """`_carry`, and where that fails find out whose fault it is.

    Raises:
        _ToolchainBroken: it is the toolchain's.
        EsperError: it is the library's, or nothing here compiles it, or the service is
            stopping. In all these cases the claim still stands.
    """
    try:
        return _carry(library, claim, forge, stop, pipeline, patience)
    except (LibraryError, QueueFull, NoBackend):
        raise
    except Exception as e:
        if not isinstance(e, EsperError):
            log.exception("unforeseen, on %s", claim.record.blueprint_id)
        # Which may have ended the compile, and leaves no time for a control.
        broken = ("" if stop.is_set()
                  else control_error(forge, claim.record.signature.device, stop.is_set))
        if stop.is_set():
            raise EsperError(f"the service is stopping: {e}") from e
        if broken:
            raise _ToolchainBroken(f"{e}; the control fails too: {broken}") from e
        reason = str(e) if isinstance(e, EsperError) else f"unforeseen: {e!r}"
        patiently(lambda: library.reject_blueprint(claim, reason), stop, patience)
        return f"refused: {reason.strip().splitlines()[0]}"


def carry(
    library: Library, claim: BlueprintClaim, forge: Forge, stop: threading.Event,
    pipeline: Pipeline | None, patience: float,
) -> str:
    """What `run` does with one claim, for those who wait for just that; what became of it.

    Raises:
        EsperError: the blueprint is not to blame, and the claim still stands.
    """
    with _kept_alive(library, claim):
        return _serve(library, claim, forge, stop, pipeline, patience)


def _allowed(breaker: CircuitBreaker, forge: Forge, stop: threading.Event) -> bool:
    """Whether the toolchain may be given work. An open breaker is waited for, and probed with
    the control when its time has come."""
    if breaker.state is BreakerState.CLOSED:
        return True
    probe = breaker.acquire()
    if probe is None:
        stop.wait(min(1.0, breaker.retry_after()))
        return False
    broken = control_error(forge, "cpu", stop.is_set)
    if broken:
        probe.failure()
        log.warning("the toolchain still fails; next look in %.0f s: %s",
                    breaker.retry_after(), broken.strip().splitlines()[-1])
    else:
        probe.success()
        log.info("the toolchain works again")
    return False


def run(
    library: Library,
    stop: threading.Event,
    *,
    worker_name: str = "tezzeret",
    poll_seconds: float = 0.5,
    pipeline: Pipeline | None = None,
    once: bool = False,
) -> None:
    """Serve until `stop` is set, or with `once` until nothing new waits.

    `pipeline` overrides the choice for all work, and leaves out recompilation while idle. No
    failure of one item ends the service. An item that failed for no fault of its own is given
    back, and so is one that nothing here compiles (see `workshop`); a toolchain that fails five
    items in five minutes gets none for a minute, and then only once the control compiles (see
    `control`).

    Raises:
        CompileError: a backend's compilers do not work; nothing was claimed.
        ConfigError: ESPER_CUDA_ARCH cannot be compiled for; nothing was claimed.
        EsperError: with `once`, what stood in the way of an item that was given back.
    """
    for backend in backends():
        backend.toolchain()
    left: deque[tuple[str, str]] = deque(maxlen=LEFT_BEHIND)
    tried: set[str] = set()
    idle_from = time.monotonic() + IDLE_SECONDS
    patience = 0.0 if once else PATIENCE_SECONDS
    breaker = CircuitBreaker("tezzeret_compilation")
    with Forge() as forge:
        while not stop.is_set():
            if not _allowed(breaker, forge, stop):
                continue
            try:
                claim = library.claim_blueprint(worker_name, LEASE_SECONDS, leave=left)
                if claim is not None:
                    idle_from = time.monotonic() + IDLE_SECONDS
                elif once:
                    return
                elif pipeline is None and (looked := time.monotonic()) >= idle_from:
                    claim = claim_idle_work(
                        library, worker_name, LEASE_SECONDS, toolchain_for, tried)
                    if claim is None:  # and all of the library was read for that
                        now = time.monotonic()
                        idle_from = now + max(IDLE_SECONDS, 10 * (now - looked))
            except EsperError:
                if once:
                    raise
                log.exception("the library did not answer")
                stop.wait(LIBRARY_PAUSE_SECONDS)
                continue
            if claim is None:
                stop.wait(poll_seconds)
                continue
            permit = breaker.acquire()
            assert permit is not None, "closed, and nobody else uses it"
            try:
                outcome = carry(library, claim, forge, stop, pipeline, patience)
            except StaleClaim:
                outcome = "lost: the lease was over"
            except NoBackend as e:
                outcome = f"left to another worker: {e}"
                left.append((claim.record.blueprint_id, claim.record.signature.id))
                with contextlib.suppress(EsperError):
                    library.release(claim)
            except EsperError as e:
                if isinstance(e, _ToolchainBroken):
                    permit.failure()
                    tried.clear()  # with a broken toolchain nothing was really tried
                outcome = f"given back: {e}"
                with contextlib.suppress(EsperError):
                    library.release(claim)
                if once:
                    raise  # it would be claimed again at once, and fail again
                stop.wait(poll_seconds)
            log.info("%s at %s: %s", claim.record.blueprint_id, claim.record.signature, outcome)
