"""Where a kernel stands among the others of the library: its tags and its risk."""

from __future__ import annotations

import logging
from pathlib import Path

from esper.leyline.artifact import Manifest
from esper.leyline.library import Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.verdict import ValidationReport
from esper.urabrask import risk
from esper.urabrask.tags import Measured, tags

log = logging.getLogger("esper.urabrask")


def measured_kernels(library: Library) -> dict[str, Measured]:
    """Manifest and report of every kernel that was ever examined, by its id."""
    return {k.kernel_id: (k.manifest, k.report) for k in library.kernels() if k.report is not None}


class Standing:
    """Tags and scores reports by what `library` holds at the moment.

    The risk model is fitted when enough field reports have come in, again whenever there are
    a tenth more of them, and then written to `risk_file` for whoever wants to see it.
    """

    def __init__(self, library: Library, risk_file: Path | None = None) -> None:
        self._library, self._file = library, risk_file
        self._model = risk.RULES
        self._seen = 0

    def place(self, manifest: Manifest, report: ValidationReport) -> ValidationReport:
        """`report` with its tags and its risk."""
        validated = self._library.kernels(
            signature=manifest.signature, status=KernelStatus.VALIDATED
        )
        peers = [(k.manifest, k.report) for k in validated if k.report is not None]
        scored = self.model.score((manifest, report))
        return report.model_copy(
            update={"tags": tags(manifest, report, peers), "risk": scored}
        )

    @property
    def model(self) -> risk.Model:
        """The risk model as of the field reports there are now."""
        reports = self._library.reports()
        if len(reports) >= max(risk.MIN_REPORTS, self._seen * 1.1):
            self._seen = len(reports)
            self._model = risk.learn(reports, measured_kernels(self._library))
            log.info("risk: %s", self._model.basis)
            if self._file is not None:
                part = self._file.with_suffix(".part")
                part.write_text(self._model.model_dump_json(indent=2) + "\n")
                part.replace(self._file)
        return self._model
