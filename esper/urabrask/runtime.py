"""Which kernels this machine can run, found out by the same kind of process that runs them.

`python -m esper.urabrask.runtime` prints a `Runtime` as JSON. The service itself stays without
torch, and an installation that is broken shows before a kernel is claimed.
"""

from __future__ import annotations

import contextlib
import functools

from esper.errors import ArtifactMismatch
from esper.leyline.artifact import Runtime
from esper.sandbox.ask import ask

START_SECONDS = 300.0  # importing torch at idle priority beside a busy trainer


@functools.cache
def runtime() -> Runtime:
    """The torch build, and the ISA and GPU arch, that a child process finds here.

    Raises:
        EsperError: no child could be started; asked again, it is tried again.
    """
    return ask("esper.urabrask.runtime", "say which kernels run here",
               Runtime.model_validate_json, START_SECONDS)


def main() -> None:
    import torch

    from esper.kasmina.artifact import this_isa

    isas = [this_isa("cpu")]
    with contextlib.suppress(ArtifactMismatch):  # no GPU
        isas.append(this_isa("cuda"))
    print(Runtime(torch=str(torch.__version__), isas=tuple(isas)).model_dump_json())


if __name__ == "__main__":
    main()
