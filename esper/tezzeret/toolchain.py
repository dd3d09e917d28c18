"""What a kernel compiled here would be built with."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

from esper.errors import CompileError
from esper.leyline.artifact import Toolchain


@functools.cache
def toolchain() -> Toolchain:
    """The torch build, ISA and compiler of this machine.

    Raises:
        CompileError: there is no C++ compiler, or it does not work.
    """
    import torch

    from esper.version import __version__

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompileError(
            f"no C++ compiler: {compiler!r} is not on PATH; install g++ or set CXX"
        )
    try:
        first_line = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout.partition("\n")[0]
    except (OSError, subprocess.SubprocessError) as e:
        raise CompileError(
            f"{compiler!r} does not say its version ({e}); install a working g++ or set CXX"
        ) from e
    return Toolchain(
        torch=str(torch.__version__), isa=torch.backends.cpu.get_cpu_capability(),
        compiler=first_line, esper=__version__,
    )
