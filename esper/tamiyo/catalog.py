"""A thread that keeps a recent copy of the library's VALIDATED kernels at hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from esper.leyline.library import Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.signature import SiteSignature
from esper.tamiyo.state import Catalog

log = logging.getLogger(__name__)


class CatalogWatch:
    """Polls `library` every `period` seconds; `current` is the last answer, never a wait.

    A library that does not answer leaves the last copy standing; the failure is logged.
    """

    def __init__(
        self, library: Library, signatures: Sequence[SiteSignature], period: float = 1.0
    ) -> None:
        self._library, self._signatures, self._period = library, tuple(signatures), period
        self.current = Catalog()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-catalog", daemon=True)
        self._thread.start()

    def refresh(self) -> Catalog:
        """Look now, on the caller's thread."""
        kernels = [
            k for s in dict.fromkeys(self._signatures)
            for k in self._library.kernels(signature=s, status=KernelStatus.VALIDATED)
        ]
        self.current = Catalog(
            tuple(kernels), tuple(self._library.reports()), self._library.capacity()
        )
        return self.current

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
