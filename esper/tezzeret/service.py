"""Tezzeret's loop: claim, analyse, compile, hand over."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from esper.errors import BlueprintError, CompileError, EsperError, QueueFull, StaleClaim
from esper.leyline.artifact import Pipeline, kernel_id
from esper.leyline.library import BlueprintClaim, Library
from esper.tezzeret.analysis import analyse
from esper.tezzeret.pipelines import choose_pipeline
from esper.tezzeret.toolchain import toolchain
from esper.tezzeret.worker import Forge

log = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
QUEUE_LIMIT = 100  # karn_to_tezzeret, section 6.3.1


@contextlib.contextmanager
def _kept_alive(library: Library, claim: BlueprintClaim) -> Iterator[None]:
    """Prolong the lease from a thread for as long as the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LEASE_SECONDS / 3):
            try:
                library.heartbeat(claim, LEASE_SECONDS)
            except EsperError:
                log.warning("the lease on %s is lost", claim.record.blueprint_id)
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def forge_one(
    library: Library, claim: BlueprintClaim, forge: Forge, stop: threading.Event,
    pipeline: Pipeline | None = None,
) -> str:
    """Carry one claimed blueprint to its end; returns what became of it, for the log."""
    record = claim.record
    load = library.depths().karn_to_tezzeret / QUEUE_LIMIT
    chosen = pipeline or record.pipeline or choose_pipeline(record.interest, load)
    try:
        analyse(record.ir, record.signature)
        identity = kernel_id(record.blueprint_id, record.signature, toolchain(), chosen)
        if any(k.kernel_id == identity for k in library.kernels(signature=record.signature)):
            library.release(claim)
            return "is in the library already"
        with _kept_alive(library, claim):
            artifact = forge.compile(record.ir, record.signature, chosen)
    except (BlueprintError, CompileError) as e:
        if isinstance(e, CompileError) and stop.is_set():
            library.release(claim)  # the forge was ended with us; the blueprint is not to blame
            return "given back: the service is stopping"
        library.reject_blueprint(claim, str(e))
        return f"refused: {str(e).strip().splitlines()[-1]}"
    kernel = library.complete_blueprint(claim, artifact)
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
    """Serve until `stop` is set, or with `once` until nothing waits.

    `pipeline` overrides the choice for all work. No failure of one item ends the service.
    """
    with Forge() as forge:
        while not stop.is_set():
            try:
                claim = library.claim_blueprint(worker_name, LEASE_SECONDS)
            except EsperError:
                log.exception("the library did not answer")
                stop.wait(poll_seconds)
                continue
            if claim is None:
                if once:
                    return
                stop.wait(poll_seconds)
                continue
            try:
                outcome = forge_one(library, claim, forge, stop, pipeline)
            except StaleClaim:
                outcome = "lost: the lease was over"
            except QueueFull as e:
                outcome = f"given back: {e}"
                library.release(claim)
                stop.wait(poll_seconds)
            log.info("%s at %s: %s", claim.record.blueprint_id, claim.record.signature, outcome)
