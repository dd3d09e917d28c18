"""The way to `esper._C`: found, checked against the torch that is running, then opened.

An extension that was built for another torch is not opened at all: loading it can crash the
process or, worse, not crash it. Without it esper runs on `plain_kernel`, which does the same
through Python.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    Kernel = Callable[[Tensor, list[Tensor], float, int], Tensor]

DISABLE = "ESPER_NO_EXTENSION"
_REBUILD = (
    "to rebuild it, run `pip install --no-build-isolation --force-reinstall --no-deps .` in "
    "esper's source folder; until then esper goes on in Python, with slower calls into kernels"
)
NO_LAUNCHES = (
    "its code is launched by esper's extension with CUDA, which is not here; choose a kernel of "
    f"compiled libraries, or, where nvcc and a CUDA build of torch are: {_REBUILD}"
)


@dataclass(frozen=True)
class BuildInfo:
    """What the extension was built for and with, from the paper beside it."""

    torch: str
    torch_cuda: str | None
    python: str
    machine: str
    compiler: str
    isa: tuple[str, ...]
    cuda: str | None
    archs: tuple[str, ...]

    def __str__(self) -> str:
        cuda = f", CUDA {self.cuda} for {' '.join(self.archs)}" if self.cuda else ", CPU only"
        sets = f" with {' '.join(self.isa)}" if self.isa else ""
        return f"torch {self.torch}, {self.python} on {self.machine}{sets}{cuda}"


def library_path(folder: Path | None = None) -> Path | None:
    """The extension that this Python would load from `folder` (default: esper's), if any."""
    folder = folder or Path(__file__).resolve().parent.parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_C{suffix}").is_file():
            return path
    return None


def read_build_info(library: Path) -> BuildInfo | None:
    """The build information beside `library`; None where it is missing or cannot be read."""
    try:
        raw = json.loads(library.with_suffix(".json").read_text())
        return BuildInfo(**{**raw, "isa": tuple(raw["isa"]), "archs": tuple(raw["archs"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cpu_flags() -> frozenset[str] | None:
    """Instruction sets of this machine as Linux names them; None where that is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return None


def why_not(info: BuildInfo | None, torch_version: str) -> str | None:
    """Why an extension with this build information must not be opened here; None if it may."""
    if info is None:
        return "esper's extension has no readable build information beside it"
    problems = []
    if info.torch != torch_version:
        problems.append(f"torch {torch_version}")
    if info.python != sys.implementation.cache_tag:
        problems.append(str(sys.implementation.cache_tag))
    flags = cpu_flags()
    if flags is not None and not flags.issuperset(info.isa):
        problems.append(f"a CPU without {' '.join(sorted(set(info.isa) - flags))}")
    if not problems:
        return None
    return f"esper's extension was built for {info}; found here: {', '.join(problems)}"


@lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """`esper._C`, or None where it is not built, disabled, or not built for this torch.

    The answer is found once per process, and where it is None that is warned of once, with
    what it was built for and what was found. ESPER_NO_EXTENSION=1 disables it, silently.
    """
    if os.environ.get(DISABLE, "0") not in ("", "0"):
        return None
    library = library_path()
    import torch

    if library is None:
        warnings.warn(
            f"esper's extension is not built (torch here is {torch.__version__}); kernels run "
            f"through torch's own runner, with slower calls; {_REBUILD}",
            RuntimeWarning, stacklevel=2,
        )
        return None
    problem = why_not(read_build_info(library), torch.__version__)
    if problem is None:
        try:
            return importlib.import_module("esper._C")
        except ImportError as e:
            problem = f"esper's extension could not be loaded: {e}"
    warnings.warn(f"{problem}; {_REBUILD}", RuntimeWarning, stacklevel=2)
    return None


def runs_on(device: str) -> bool:
    """Whether there is an extension, and it runs kernels on `device`."""
    native = extension()
    return native is not None and (device == "cpu" or bool(native.with_cuda))


def open_kernel(
    forward_so: str,
    backward_so: str,
    backward_inputs: list[str],
    gradients: list[int],
    device: str,
    dtype: str = "float32",
    shapes: Sequence[Sequence[int]] = (),
) -> Kernel:
    """Open a compiled pair as `kernel(h, params, alpha, mode) -> Tensor`.

    Args:
        forward_so: takes `[h, alpha, *params]`, returns `[out, *saved]`.
        backward_so: takes what `backward_inputs` lists, returns gradients.
        backward_inputs: "in:I" (forward input), "out:K" (forward output) or "grad".
        gradients: for h, then for each parameter: index of its gradient among the outputs of
            the backward, -1 for none.
        device: "cpu", "cuda" or "cuda:N".
        dtype: element type of h and the parameters, by its torch name. A call with another is
            refused: compiled code would take its bytes for the type it was made for.
        shapes: sizes of h and of each parameter, -1 where any will do. A call with others is
            refused: compiled code would read beyond their end. Empty: not checked.

    Raises:
        ValueError: the arguments contradict each other.
        RuntimeError: a library cannot be opened.
    """
    if runs_on(device):
        make: Any = cast("Any", extension()).SeedKernel
    else:
        from esper.kasmina.plain_kernel import SeedKernel

        make = SeedKernel
    return cast("Kernel", make(forward_so, backward_so, backward_inputs, gradients, device, dtype,
                               [list(shape) for shape in shapes]))
