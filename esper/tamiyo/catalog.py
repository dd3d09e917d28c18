"""A thread that keeps a recent copy of the library's VALIDATED kernels at hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.library import Change, KernelRecord, Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.signature import SiteSignature
from esper.tamiyo.state import Catalog

log = logging.getLogger(__name__)


@runtime_checkable
class Numbered(Protocol):
    """A library that numbers its changes, as `KeptLibrary` does."""

    def changes(self, after: int | None = None, limit: int = 1000) -> list[Change]: ...


class CatalogWatch:
    """Polls `library` every `period` seconds; `current` is the last answer, never a wait.

    A library that does not answer leaves the last copy standing; the failure is logged. One
    that numbers its changes is asked for its kernels only after something changed: reading a
    thousand of them takes a good part of a second, of an interpreter that is training.

    Args:
        why_not: the reason why a kernel cannot run here, "" where it can. Those that cannot are
            left out, each with one line in the log: a library outlives torch builds, and may
            be shared with other machines.
    """

    def __init__(
        self,
        library: Library,
        signatures: Sequence[SiteSignature],
        period: float = 1.0,
        why_not: Callable[[KernelRecord], str] = lambda kernel: "",
    ) -> None:
        self._library, self._signatures, self._period = library, tuple(signatures), period
        self._why_not = why_not
        self._left_out: set[str] = set()
        self._graphs: dict[str, BlueprintIR] = {}  # by blueprint id
        self.current = Catalog()
        self._seen: int | None = None  # the change that the kernels of `current` are as of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-catalog", daemon=True)
        self._thread.start()

    def refresh(self) -> Catalog:
        """Look now, on the caller's thread."""
        newest = self._newest()  # before the kernels: what changes meanwhile is seen next time
        kernels, graphs = self.current.kernels, self.current.blueprints
        if newest is None or newest != self._seen:
            kernels = tuple(
                k for s in dict.fromkeys(self._signatures)
                for k in self._library.kernels(signature=s, status=KernelStatus.VALIDATED)
                if self._runs_here(k)
            )
            graphs = self._blueprints(kernels)
        self.current = Catalog(
            kernels, tuple(self._library.reports()), self._library.capacity(),
            self._library.depths(), graphs,
        )
        self._seen = newest
        return self.current

    def _blueprints(self, kernels: Sequence[KernelRecord]) -> dict[str, BlueprintIR]:
        """The graphs of `kernels`. A blueprint never changes, so each is read once."""
        missing = {k.manifest.signature for k in kernels if k.blueprint_id not in self._graphs}
        for signature in missing:
            for record in self._library.blueprints(signature):
                self._graphs.setdefault(record.blueprint_id, record.ir)
        return {k.blueprint_id: self._graphs[k.blueprint_id] for k in kernels
                if k.blueprint_id in self._graphs}

    def _newest(self) -> int | None:
        """Number of the library's last change, None where it does not number them."""
        if not isinstance(self._library, Numbered):
            return None
        return max((c.sequence for c in self._library.changes(limit=1)), default=0)

    def _runs_here(self, kernel: KernelRecord) -> bool:
        reason = self._why_not(kernel)
        if reason and kernel.kernel_id not in self._left_out:
            self._left_out.add(kernel.kernel_id)
            log.info("left out of the catalog: %s", reason)
        return not reason

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.refresh()
            except Exception:
                log.warning("the library did not answer; going on with the last copy",
                            exc_info=True)
            self._stop.wait(self._period)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
