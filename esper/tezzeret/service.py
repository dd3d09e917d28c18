"""Tezzeret's loop: claim, analyse, compile, hand over."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from esper.errors import (
    ArtifactError,
    BlueprintError,
    CompileError,
    EsperError,
    QueueFull,
    StaleClaim,
)
from esper.leyline.artifact import Pipeline, kernel_id
from esper.leyline.library import BlueprintClaim, KernelRecord, Library
from esper.tezzeret.analysis import analyse
from esper.tezzeret.idle import claim_idle_work
from esper.tezzeret.pipelines import choose_pipeline
from esper.tezzeret.toolchain import toolchain
from esper.tezzeret.worker import Forge

log = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
IDLE_SECONDS = 10.0  # without new work, before old kernels are looked at
PATIENCE_SECONDS = 300.0  # with a full queue of kernels, before an artifact is given up
QUEUE_LIMIT = 100  # karn_to_tezzeret, section 6.3.1


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


def _hand_over(
    library: Library, claim: BlueprintClaim, artifact: bytes, stop: threading.Event, patience: float
) -> KernelRecord:
    """Give the artifact to the library, waiting for room: it was dear to make.

    Raises:
        QueueFull: there was no room for `patience` seconds, or the service is stopping.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return library.complete_blueprint(claim, artifact)
        except QueueFull:
            if stop.is_set() or time.monotonic() >= end:
                raise
            stop.wait(1.0)


def _carry(
    library: Library, claim: BlueprintClaim, forge: Forge, stop: threading.Event,
    pipeline: Pipeline | None, patience: float,
) -> str:
    """Bring one claimed blueprint to its end; returns what became of it, for the log."""
    record = claim.record
    load = library.depths().karn_to_tezzeret / QUEUE_LIMIT
    chosen = pipeline or record.pipeline or choose_pipeline(record.interest, load)
    try:
        analyse(record.ir, record.signature)
    except BlueprintError as e:
        library.reject_blueprint(claim, str(e))
        return f"refused: {e}"
    identity = kernel_id(record.blueprint_id, record.signature, toolchain(), chosen)
    for known in library.kernels(signature=record.signature):
        if known.kernel_id == identity:
            # Released it would come straight back; completed with what is there it is done.
            library.complete_blueprint(claim, library.fetch(known.digest).read_bytes())
            return f"is in the library already: {identity}"
    with _kept_alive(library, claim):
        forge.start(stop.is_set)  # where this fails, the blueprint is not to blame
        try:
            artifact = forge.compile(
                record.ir, record.signature, chosen, cancelled=stop.is_set
            )
            kernel = _hand_over(library, claim, artifact, stop, patience)
        except (CompileError, ArtifactError) as e:
            if stop.is_set():
                raise
            library.reject_blueprint(claim, str(e))
            return f"refused: {str(e).strip().splitlines()[-1]}"
    return f"{chosen} kernel {kernel.kernel_id} in {kernel.manifest.compile_seconds:.1f} s"


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
    failure of one item ends the service; an item that failed for no fault of its own is given
    back.

    Raises:
        CompileError: there is no working C++ compiler; nothing was claimed.
    """
    tools = toolchain()
    tried: set[str] = set()
    last_new = time.monotonic()
    with Forge() as forge:
        while not stop.is_set():
            try:
                claim = library.claim_blueprint(worker_name, LEASE_SECONDS)
                if claim is not None:
                    last_new = time.monotonic()
                elif once:
                    return
                elif pipeline is None and time.monotonic() - last_new >= IDLE_SECONDS:
                    claim = claim_idle_work(library, worker_name, LEASE_SECONDS, tools, tried)
            except EsperError:
                log.exception("the library did not answer")
                claim = None
            if claim is None:
                stop.wait(poll_seconds)
                continue
            patience = 0.0 if once else PATIENCE_SECONDS
            try:
                outcome = _carry(library, claim, forge, stop, pipeline, patience)
            except StaleClaim:
                outcome = "lost: the lease was over"
            except Exception as e:
                outcome = f"given back: {e}"
                if not isinstance(e, EsperError):
                    log.exception("unforeseen, on %s", claim.record.blueprint_id)
                with contextlib.suppress(EsperError):
                    library.release(claim)
                if once:
                    raise  # it would be claimed again at once, and fail again
                stop.wait(poll_seconds)
            log.info("%s at %s: %s", claim.record.blueprint_id, claim.record.signature, outcome)
