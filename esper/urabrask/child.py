"""The child process that runs one foreign kernel: `python -m esper.urabrask.child`.

It proves the kernel, or measures it, never both: each stage has a process of its own. Reads
a `Spec` as JSON from standard input and writes a `ValidationReport` as JSON to the spec's
`report`. The file appears whole or not at all, so a crash at any point leaves none.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

from pydantic import Field

from esper.leyline.base import Contract
from esper.leyline.verdict import ValidationReport
from esper.urabrask.plan import Plan

_PR_SET_PDEATHSIG = 1
# What the stage file says until the kernel is touched. A failure before that is not its fault.
NOT_YET = "the start"
# Foreign code is never unloaded: what it does then proves nothing.
_OPENED: list[object] = []


class Spec(Contract):
    """What to examine. `folder` is an empty scratch folder; `parent` the waiting process.

    With a `plan` the kernel is measured, without one it is proved.
    """

    kernel_id: str
    artifact: str
    digest: str
    report: str
    stage: str
    folder: str
    parent: int
    plan: Plan | None = None
    memory_bytes: int = Field(gt=0)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the line above
        sys.exit(1)


def _fence(spec: Spec) -> None:
    """Bound what a runaway kernel can take, and keep its litter where it is counted."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = spec.memory_bytes if hard == resource.RLIM_INFINITY else min(hard, spec.memory_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    os.chdir(spec.folder)
    os.environ["TMPDIR"] = tempfile.tempdir = spec.folder


def _examine(spec: Spec) -> ValidationReport:
    stage_file = Path(spec.stage)
    stage_file.write_text(NOT_YET)

    # Not used here, but if it is missing that must show before the kernel's turn.
    import torch

    import esper.kasmina.native  # noqa: F401
    from esper.errors import ArtifactError
    from esper.kasmina.artifact import open_artifact
    from esper.urabrask.clock import clock
    from esper.urabrask.examine import Subject, measure_only, prove_only

    start = clock()
    torch.set_num_threads(1)
    stage_file.write_text("the opening of the artifact")
    try:
        opened = open_artifact(spec.artifact, spec.digest)
    except ArtifactError as e:
        return ValidationReport(
            kernel_id=spec.kernel_id,
            accepted=False,
            reason=f"{type(e).__name__}: {e}",
            seconds=clock() - start,
        )

    _OPENED.append(opened)

    def stage(name: str) -> None:
        stage_file.write_text(name)

    subject = Subject(
        spec.kernel_id, opened.kernel, opened.ir, opened.manifest.signature, stage
    )
    if spec.plan is not None:
        return measure_only(subject, spec.plan)
    return prove_only(subject, Path(spec.folder))


def main() -> None:
    spec = Spec.model_validate_json(sys.stdin.buffer.read())
    _die_with(spec.parent)
    _fence(spec)
    report = _examine(spec)
    whole, part = Path(spec.report), Path(spec.report + ".part")
    part.write_text(report.model_dump_json())
    part.rename(whole)
    # Nor is the interpreter shut down, which would unload it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
