"""Which backends a worker has, and which of them compiles a blueprint.

For cpu it is Inductor. For cuda, Triton's templates come before Inductor: they need no GPU, only
to be told what is compiled for. That is this machine's GPU, or, with or without one,

    ESPER_CUDA_ARCH     an arch, "sm_80" or "sm_90"

A worker that can compile for no GPU has no backend for cuda, and leaves such blueprints to others.
"""

from __future__ import annotations

import functools
import importlib.util
import os

from esper.errors import CompileError, ConfigError, NoBackend
from esper.leyline.artifact import Toolchain
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.launch import SHARED_LIMITS
from esper.leyline.library import BlueprintRecord
from esper.leyline.signature import SiteSignature
from esper.tezzeret.backends import Backend
from esper.tezzeret.cubins import TritonTemplates
from esper.tezzeret.inductor import InductorCpu, InductorCuda, gpu_arch

CUDA_ARCH = "ESPER_CUDA_ARCH"


def backends() -> tuple[Backend, ...]:
    """This worker's, in the order in which they are asked.

    Raises:
        ConfigError: ESPER_CUDA_ARCH names none that anything is compiled for.
    """
    return _backends(os.environ.get(CUDA_ARCH, "").strip())


@functools.lru_cache(maxsize=4)
def _backends(asked: str) -> tuple[Backend, ...]:
    if asked and asked not in SHARED_LIMITS:
        raise ConfigError(
            f"{CUDA_ARCH} is {asked!r}; it must be one of {', '.join(SHARED_LIMITS)}, or not be "
            "set (then it is this machine's GPU's)"
        )
    here = gpu_arch()
    arch = asked or here or ""
    found: list[Backend] = [InductorCpu()]
    if arch in SHARED_LIMITS and (asked or importlib.util.find_spec("triton") is not None):
        found.append(TritonTemplates(arch))
    if here is not None and arch == here:
        found.append(InductorCuda())
    return tuple(found)


def backend_for(ir: BlueprintIR, signature: SiteSignature) -> Backend:
    """The backend that compiles `ir` at `signature` here.

    Raises:
        NoBackend: none does; says what each of them has against it.
        ConfigError: see `backends`.
    """
    refusals = []
    for backend in backends():
        why = backend.why_not(ir, signature)
        if not why:
            return backend
        refusals.append(f"{backend.name}: {why}")
    raise NoBackend(
        f"no backend of this worker compiles {ir.name or ir.id} for {signature} "
        f"({'; '.join(refusals)}). Inductor compiles for cuda where there is a GPU, Triton's "
        f"templates where {CUDA_ARCH} says for which"
    )


def toolchain_for(record: BlueprintRecord) -> Toolchain | None:
    """What a kernel of `record` compiled here would be built with; None where none can be."""
    try:
        return backend_for(record.ir, record.signature).toolchain()
    except CompileError:
        return None
