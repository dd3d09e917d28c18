"""The child process that runs one foreign kernel: `python -m esper.urabrask.child`.

It proves the kernel, or measures it, never both: each stage has a process of its own. Reads
a `Spec` as JSON from standard input, shuts itself in (`esper.sandbox`), and writes a
`ValidationReport` as JSON to the spec's `report`. The file appears whole or not at all, so a
crash at any point leaves none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path

from esper.leyline.base import Contract
from esper.leyline.verdict import ValidationReport
from esper.sandbox.allowance import Allowance
from esper.sandbox.layers import Layer, enter
from esper.urabrask.plan import Plan

_PR_SET_PDEATHSIG = 1
# Foreign code is never unloaded: what it does then proves nothing.
_OPENED: list[object] = []


class Spec(Contract):
    """What to examine. `folder` is an empty folder for the report and all else that is written;
    `parent` the waiting process, `stage` the descriptor of a pipe to it.

    Into the pipe goes a line for each stage, none before the kernel is touched: a failure until
    then is not its fault. From a pipe no kernel can take back what it says.
    With a `plan` the kernel is measured, without one it is proved.
    """

    kernel_id: str
    artifact: str
    digest: str
    report: str
    stage: int
    folder: str
    parent: int
    plan: Plan | None = None
    allowance: Allowance
    layers: tuple[Layer, ...]


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the line above
        sys.exit(1)


def _fence(spec: Spec) -> None:
    """Bound what a runaway kernel can take, and keep its litter where it is counted."""
    os.environ["TMPDIR"] = tempfile.tempdir = spec.folder
    enter(spec.layers, spec.allowance, [Path(spec.folder)])
    os.chdir(spec.folder)  # not sooner: the way there leads over a mount of our own


def _examine(spec: Spec) -> ValidationReport:
    # Not used here, but if it is missing that must show before the kernel's turn.
    import torch

    import esper.kasmina.native  # noqa: F401
    from esper.errors import ArtifactError
    from esper.kasmina.artifact import open_artifact
    from esper.urabrask.clock import clock
    from esper.urabrask.examine import Subject, measure_only, prove_only

    start = clock()
    torch.set_num_threads(1)

    def stage(name: str) -> None:
        os.write(spec.stage, f"{name}\n".encode())

    stage("the opening of the artifact")
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
