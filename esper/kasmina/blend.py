"""Blending a seed's output into its host's, by what does it fastest where the tensors are."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from importlib.util import find_spec

import torch
from torch import Tensor

from esper.kasmina.native import extension

OVERRIDE = "ESPER_BLEND"
NAMES = ("native", "triton", "torch")
"""The C++ and CUDA extension; the Triton kernels, on CUDA devices; torch's own `lerp`."""

Implementation = Callable[[Tensor, Tensor, float, bool], Tensor]

# What benchmarks/bench_blend.py found, by kind of device: on CPUs the extension is level with
# torch up to some MiB and two to four times as fast where memory comes fresh from the system, so
# there is nothing to gain from measuring again, and a noisy moment cannot change the choice.
# No GPU was at hand, so there it is measured by who has one.
_MEASURED = {"cpu": "native"}

_PROBE = 1 << 24  # elements: more than the caches of a GPU hold
_ROUNDS = 7

_chosen: dict[tuple[torch.device, torch.dtype], Implementation] = {}


def blend(h: Tensor, s: Tensor, alpha: float, *, reuse: bool = False) -> Tensor:
    """`h + alpha * (s - h)`, with gradients `(1 - alpha) * g` for h and `alpha * g` for s.

    At alpha = 0 and 1 the very tensor `h` or `s` is returned: what is blended out has no
    influence, not even where it is inf or NaN, and gets no gradient. bfloat16 and float16 are
    computed in float32. Any strides will do; the result is laid out as `torch.lerp` lays it out
    (where Triton blends, it is contiguous).

    Args:
        h: output of the host, floating point, any shape.
        s: output of the seed, of the same shape, type and device.
        alpha: within 0 and 1.
        reuse: you have no more use for `s`, and its memory may be written to. The extension does
            so where nothing else can see that memory, and then returns `s` itself: not where a
            view, an alias (`h`, say) or a tensor saved by what made `s` shares it, not where `s`
            is a leaf that requires a gradient or has a history under `no_grad`, and not where it
            is an inference tensor outside of inference mode. If `s` was used before and saved
            for that use's backward, autograd raises there, as for any change in place. Only what
            torch knows of can be seen: memory that came from outside (`torch.from_numpy`, a blob
            in C++) counts as the tensor's own. So you must not have handed the memory of `s` to
            anybody who still reads it: an array by `.numpy()` or DLPack, another process.

    Raises:
        ValueError: the tensors do not agree, or alpha is out of range; or ESPER_BLEND names an
            implementation that does not exist or cannot be had here.
    """
    if torch.compiler.is_compiling():
        return _torch(h, s, alpha, reuse)  # which the compiler fuses with what is around it
    return implementation(h.device, h.dtype)(h, s, alpha, reuse)


def chosen(device: torch.device, dtype: torch.dtype) -> str:
    """Which of NAMES blends such tensors in this process; see `implementation`."""
    return implementation(device, dtype).__name__.removeprefix("_")


def implementation(device: torch.device, dtype: torch.dtype) -> Implementation:
    """What blends such tensors in this process.

    On CPUs the extension where it is built, as measured once by its benchmark. On a CUDA device
    all that can be had are measured at the first call for a device and element type, forward
    and backward, in alternation, on 2^24 elements; that waits for the device. With
    ESPER_BLEND=native|triton|torch it is that one. All give the same values up to the last bit
    of the element type.
    """
    found = _chosen.get((device, dtype))
    if found is None:
        available = _available(device)
        known = _MEASURED.get(device.type)
        if wanted := os.environ.get(OVERRIDE):
            found = _named(wanted, available, device)
        elif known in available:
            found = available[known]
        elif len(available) == 1 or not dtype.is_floating_point:
            found = next(iter(available.values()))
        elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return next(iter(available.values()))  # nothing can be timed in a capture
        else:
            # In a thread of its own, where no mode, transform or autocast of the caller's holds.
            try:
                with ThreadPoolExecutor(1) as thread:
                    seconds = thread.submit(_measure, available, device, dtype).result()
            except torch.OutOfMemoryError:  # the step needs its memory more than a choice does
                return next(iter(available.values()))
            found = available[min(seconds, key=seconds.__getitem__)]
        _chosen[device, dtype] = found
    return found


def _named(
    wanted: str, available: dict[str, Implementation], device: torch.device
) -> Implementation:
    if wanted not in NAMES:
        near = get_close_matches(wanted, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{OVERRIDE}={wanted} is none of {', '.join(NAMES)}; the nearest is {near}"
        )
    if wanted not in available:
        raise ValueError(
            f"{OVERRIDE}={wanted} cannot be had for tensors on {device}; there are "
            f"{', '.join(available)}. `esper doctor` says what is built and installed"
        )
    return available[wanted]


def _available(device: torch.device) -> dict[str, Implementation]:
    """Those of NAMES that work on `device`, in that order."""
    found: dict[str, Implementation] = {}
    native = extension()
    devices = ("cpu", "cuda") if native is not None and native.with_cuda else ("cpu",)
    if native is not None and device.type in devices:
        found["native"] = _native
    if device.type == "cuda" and find_spec("triton") is not None:
        found["triton"] = _triton
    found["torch"] = _torch
    return found


def _measure(
    available: dict[str, Implementation], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median seconds of one forward and backward of each."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples: dict[str, list[float]] = {name: [] for name in available}
    h, s, g = (torch.ones(_PROBE, device=device, dtype=dtype) for _ in range(3))
    h.requires_grad_()
    s.requires_grad_()
    for round_number in range(_ROUNDS + 1):
        for name, run in available.items():
            wait()
            start = time.perf_counter()
            torch.autograd.grad(run(h, s, 0.3, False), (h, s), g)
            wait()
            if round_number:  # the first compiles, and warms caches
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _native(h: Tensor, s: Tensor, alpha: float, reuse: bool) -> Tensor:
    native = extension()
    assert native is not None
    out: Tensor = native.blend(h, s, alpha, reuse)
    return out


def _triton(h: Tensor, s: Tensor, alpha: float, reuse: bool) -> Tensor:
    from esper.triton_kernels.blend import blend as fused

    return fused(h, s, alpha)


def _torch(h: Tensor, s: Tensor, alpha: float, reuse: bool) -> Tensor:
    _check(h, s, alpha)
    return (s if alpha else h) if alpha in (0.0, 1.0) else torch.lerp(h, s, alpha)


def _check(h: Tensor, s: Tensor, alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be within 0 and 1")
    if h.shape != s.shape or h.dtype != s.dtype or h.device != s.device:
        raise ValueError(
            f"blend was given h of {list(h.shape)} {h.dtype} on {h.device} and s of "
            f"{list(s.shape)} {s.dtype} on {s.device}; both must have the same shape, type and "
            "device"
        )
    if not h.is_floating_point():
        raise ValueError(f"blend was given {h.dtype}; it needs a floating point type")
