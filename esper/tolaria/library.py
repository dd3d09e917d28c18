"""A session's way to the library: looked at by a thread, read and written off the training thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from esper.errors import ArtifactMismatch, EsperError
from esper.kasmina.artifact import check_runs_here
from esper.kasmina.loader import Loader
from esper.leyline.command import FieldReport
from esper.leyline.library import KernelRecord, Library
from esper.leyline.signature import SiteSignature
from esper.tamiyo.catalog import CatalogWatch
from esper.tamiyo.state import Catalog
from esper.tolaria.telemetry import outgoing

log = logging.getLogger(__name__)


class LibraryLink:
    """Without a library there is an empty catalog, and what would be written is dropped.

    `reported` holds the ids of this run's field reports. What the library has of this run besides
    comes from a future that was undone, when the run was killed and resumed, and is not decided on.
    `outgoing` is an observer where the library passes events on. With `only_kernels`, for the ranks
    that do not decide, kernels are fetched and nothing else is read or written.
    """

    def __init__(
        self, library: Library | None, signatures: Sequence[SiteSignature], *,
        only_kernels: bool = False,
    ) -> None:
        self.loader = Loader(library) if library is not None else None
        if only_kernels:
            library = None
        self._library = library
        self.reported: set[str] = set()
        self.watch: CatalogWatch | None = None
        self.outgoing = outgoing(library)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="esper-writer")
        if library is not None:
            for signature in dict.fromkeys(signatures):
                library.register_signature(signature)
            self.watch = CatalogWatch(library, signatures, why_not=_why_not_here)

    def catalog(self, run_id: str, now: bool) -> Catalog:
        """What to decide on: as last polled, or with `now` as it stands, waited for."""
        if self.watch is None:
            return Catalog()
        catalog = self.watch.current
        if now:
            self.writer.submit(lambda: None).result()  # what was settled before is in it
            try:
                catalog = self.watch.refresh()
            except EsperError as e:
                log.warning("the library did not answer; deciding on the last copy: %s", e)
        return replace(catalog, reports=tuple(
            r for r in catalog.reports if r.run_id != run_id or r.report_id in self.reported))

    def quarantine(self, kernel_id: str, reason: str) -> None:
        self._in_background("quarantine", lambda lib: lib.quarantine(kernel_id, reason))

    def report(self, report: FieldReport) -> None:
        self.reported.add(report.report_id)
        self._in_background("field report", lambda lib: lib.add_report(report))

    def _in_background(self, what: str, work: Callable[[Library], None]) -> None:
        """A failure is logged, no more."""
        library = self._library
        if library is None:
            return

        def run() -> None:
            try:
                work(library)
            except Exception:
                log.warning("%s was not written to the library", what, exc_info=True)

        self.writer.submit(run)

    def close(self) -> None:
        """Stop the threads; waits for what is being written."""
        if self.watch is not None:
            self.watch.close()
        if self.loader is not None:
            self.loader.close()
        if self.outgoing is not None:
            self.outgoing.close()
        self.writer.shutdown(wait=True)


def _why_not_here(kernel: KernelRecord) -> str:
    try:
        check_runs_here(kernel.manifest)
    except ArtifactMismatch as e:
        return str(e)
    return ""
