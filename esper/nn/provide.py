"""Proven kernels for matched modules: from the library, or compiled and proved for it.

Both happen as the services do it, in child processes, through the library's own queue, so a
slow track that serves the same library is no hindrance: whoever claims the work does it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from esper.errors import ArtifactMismatch, EsperError
from esper.kasmina.artifact import Kernel, check_runs_here, open_artifact
from esper.leyline.artifact import Pipeline
from esper.leyline.events import Priority
from esper.leyline.library import BlueprintClaim, KernelRecord, Library
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.nn.trace import Match
from esper.nn.values import NoMatch
from esper.tezzeret import service as tezzeret
from esper.tezzeret.worker import Forge
from esper.urabrask import service as urabrask

WORKER = "accelerate"
LEASE_SECONDS = 120.0
PATIENCE_SECONDS = 1200.0  # for a kernel that another process has in hand
POLL_SECONDS = 0.5
_ORDER = (Pipeline.FAST, Pipeline.STANDARD, Pipeline.AGGRESSIVE)


class Provider:
    """Gives each match a kernel. Use as a context manager: its forge ends with it."""

    def __init__(self, library: Library, pipeline: Pipeline, say: Callable[[str], None]) -> None:
        self._library, self._pipeline, self._say = library, pipeline, say
        self._forge = Forge()
        self._never = threading.Event()

    def __enter__(self) -> Provider:
        return self

    def __exit__(self, *exc: object) -> None:
        self._forge.close()

    def kernel(self, found: Match, name: str) -> tuple[KernelRecord, Kernel]:
        """The fastest proven kernel of `found` that runs here, opened.

        Raises:
            NoMatch: it could not be compiled, or was not proven; says why.
            LibraryError, CompileError: the library or the compiler does not work at all.
        """
        if not any(k.status is KernelStatus.VALIDATED for k in self._wanted(found)):
            try:
                self._compile(found, name)
                self._prove(found, name)
            except NoMatch:
                if self._fastest(found) is None:
                    raise  # else one of a lesser pipeline serves
        record = self._fastest(found)
        assert record is not None
        path = self._library.fetch(record.digest)
        return record, open_artifact(path, record.digest, found.signature).kernel

    def _known(self, found: Match) -> list[KernelRecord]:
        """All kernels of this blueprint that this machine could run."""
        fitting = []
        for record in self._library.kernels(signature=found.signature):
            if record.blueprint_id == found.ir.id:
                try:
                    check_runs_here(record.manifest, found.signature)
                except ArtifactMismatch:
                    continue
                fitting.append(record)
        return fitting

    def _wanted(self, found: Match) -> list[KernelRecord]:
        """Those for which the compiler took at least the time that was asked for."""
        least = _ORDER.index(self._pipeline)
        return [k for k in self._known(found) if _ORDER.index(k.manifest.pipeline) >= least]

    def _fastest(self, found: Match) -> KernelRecord | None:
        proven = [k for k in self._known(found) if k.status is KernelStatus.VALIDATED]

        def speedup(record: KernelRecord) -> float:
            return (record.report and record.report.speedup) or 0.0

        return max(proven, key=speedup, default=None)

    def _status(self, found: Match) -> tuple[BlueprintStatus, str]:
        for record in self._library.blueprints(found.signature):
            if record.blueprint_id == found.ir.id:
                return record.status, record.reason
        raise NoMatch("the library lost its blueprint; call accelerate again")

    def _compile(self, found: Match, name: str) -> None:
        """Bring the blueprint to COMPILED, with a kernel that runs here."""
        library = self._library
        library.submit(
            found.ir, found.signature, author=WORKER, interest=1.0,
            # Somebody waits at a prompt, and what waits in the queue is for later.
            priority=Priority.EMERGENCY, pipeline=self._pipeline,
        )
        told = False
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._wanted(found):
            status, reason = self._status(found)
            if status in (BlueprintStatus.INVALID, BlueprintStatus.ARCHIVED):
                raise NoMatch(f"it could not be compiled: {_last_line(reason)}")
            if not told:
                self._say(f"compiling {name} for {found.signature}")
                told = True
            claim = self._claim(found, status)
            if claim is not None:
                outcome = self._carry(claim)
                if not self._wanted(found):
                    raise NoMatch(f"it could not be compiled: {outcome}")
            elif time.monotonic() > end:
                raise NoMatch("another process has been compiling it for too long")
            else:
                time.sleep(POLL_SECONDS)

    def _carry(self, claim: BlueprintClaim) -> str:
        try:
            return tezzeret.carry(self._library, claim, self._forge, self._never, self._pipeline,
                                  PATIENCE_SECONDS)
        except EsperError:
            with contextlib.suppress(EsperError):
                self._library.release(claim)
            raise

    def _claim(self, found: Match, status: BlueprintStatus) -> BlueprintClaim | None:
        library = self._library
        if status is BlueprintStatus.COMPILED:  # by another toolchain
            return library.claim_recompilation(
                found.ir.id, found.signature, WORKER, LEASE_SECONDS, self._pipeline
            )
        claim = library.claim_blueprint(WORKER, LEASE_SECONDS)
        if claim is not None and (
            claim.record.blueprint_id, claim.record.signature.id) != found.key:
            library.release(claim)
            return None
        return claim

    def _prove(self, found: Match, name: str) -> None:
        """See to it that one of the wanted kernels is VALIDATED."""
        told = False
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            known = self._wanted(found)
            if any(k.status is KernelStatus.VALIDATED for k in known):
                return
            waiting = [k for k in known if k.status in (KernelStatus.PENDING_BENCHMARKING,
                                                        KernelStatus.BENCHMARKING)]
            if not waiting:
                refused = known[0]
                raise NoMatch(f"its kernel is {refused.status}: {_last_line(refused.reason)}")
            if not told:
                self._say(f"proving {name}")
                told = True
            claim = self._library.claim_kernel(WORKER, LEASE_SECONDS)
            if claim is not None and claim.record.kernel_id in {k.kernel_id for k in waiting}:
                urabrask.handle(self._library, claim, self._never)
                continue
            if claim is not None:
                self._library.release(claim)
            if time.monotonic() > end:
                raise NoMatch("another process has been proving its kernel for too long")
            time.sleep(POLL_SECONDS)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason is known"])[-1][:300]
