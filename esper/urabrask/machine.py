"""The machine that measures: what it is, and what it can reach at best.

Both roofs are measured in the process that measures the kernel, on its number of threads:
a data sheet knows neither the neighbours of a shared machine nor its clock at the moment.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from esper.kasmina.artifact import this_isa
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import Cost, Hardware, Roofline
from esper.urabrask.clock import clock

_MEMORY_BYTES = 64 << 20  # of each of three arrays, far more than any cache of one core
_CACHE_BYTES = 64 << 10  # of each of three, so that they fit a core's second-level cache
_PRODUCT = 768  # rows and columns of the matrix product
_ATTEMPTS = 7
_MOST_SECONDS = 0.5  # for one roof; products in half precision are slow on some processors


def hardware(device: str = "cpu") -> Hardware:
    """Where this process measures."""
    return Hardware(
        cpu=_processor(device),
        isa=this_isa(device),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
    )


def _processor(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def roofline(dtype: str) -> Roofline:
    """Bandwidth by a triad and the peak of a matrix product in `dtype`; takes about 0.5 s.

    The best of several attempts counts, as in McCalpin's STREAM: what slows a roof down is
    not the roof.
    """
    return Roofline(
        memory_bytes_per_second=_triad(_MEMORY_BYTES, repeats=1),
        cache_bytes_per_second=_triad(_CACHE_BYTES, repeats=200),
        flops_per_second=_product(getattr(torch, dtype)),
        dtype=dtype,
    )


def _best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, by the fastest of several attempts of `repeats` calls each."""
    call()
    times: list[float] = []
    while len(times) < _ATTEMPTS and sum(times) < _MOST_SECONDS:
        start = clock()
        for _ in range(repeats):
            call()
        times.append(clock() - start)
    return min(times) / repeats


def _triad(size: int, repeats: int) -> float:
    a, b, out = (torch.ones(size // 4) for _ in range(3))
    return 3 * size / _best(lambda: torch.add(a, b, alpha=2, out=out), repeats)


def _product(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _PRODUCT**3 / _best(lambda: torch.mm(a, b, out=out), 1)


def cost(ir: BlueprintIR, signature: SiteSignature, batch: int, space: int) -> Cost:
    """The work of one forward and backward step at one shape; see `Cost` for what counts."""
    inferred = infer(ir, signature, space)
    activation = 4 * torch.Size(signature.shape(batch, space)).numel()  # h, out, both gradients
    itemsize = getattr(torch, signature.dtype).itemsize
    return Cost(
        flops=3 * batch * inferred.flops,
        bytes=itemsize * (activation + 2 * inferred.parameter_count),
    )
