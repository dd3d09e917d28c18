"""How a kernel behaves beside being right: what it must leave alone and leave behind.

Each check returns the reason for a refusal, or "" where there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from esper.kasmina.artifact import Kernel
from esper.leyline.mode import FULL
from esper.urabrask.clock import replaced
from esper.urabrask.oracle import Problem, run

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: 0.0 is not -0.0, and a NaN is itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def run_watched(kernel: Kernel, problem: Problem) -> tuple[list[Tensor], str]:
    """Run forward and backward; the reason names an input that was written to."""
    inputs = {"h": problem.h, "the gradient of out": problem.grad_out}
    inputs |= {f"parameter {i}": p for i, p in enumerate(problem.params)}
    before = {name: t.clone() for name, t in inputs.items()}
    results = run(kernel, problem)
    changed = [name for name, t in inputs.items() if not same_bits(t, before[name])]
    if changed:
        return results, f"the kernel writes to its input: {', '.join(changed)} changed"
    return results, ""


def reuse(kernel: Kernel, first: Problem, second: Problem) -> str:
    """Two calls must not share an output or a gradient, nor one the other's saved tensors."""
    a = run(kernel, first)
    kept = [t.clone() for t in a]
    b = run(kernel, second)
    if not all(same_bits(t, k) for t, k in zip(a, kept, strict=True)):
        return "an output is reused: the first call's result changed during the second call"
    if same_bits(a[0], b[0]):
        return "an output is reused: two calls on different inputs gave the same result"
    storages = {t.untyped_storage().data_ptr() for t in a if t.numel()}
    inputs = [first.h, *first.params, second.h, *second.params]
    if storages & {t.untyped_storage().data_ptr() for t in b if t.numel()}:
        return "an output is reused: two calls returned tensors of one storage"
    if a[0].untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in inputs}:
        return "the output shares its storage with an input at an alpha between 0 and 1"
    return _interleaved(kernel, first, second)


def _interleaved(kernel: Kernel, first: Problem, second: Problem) -> str:
    """Forward twice, then backward twice, in either order, as gradient accumulation does."""
    expected = [run(kernel, p)[1:] for p in (first, second)]
    for order in ((0, 1), (1, 0)):
        graphs = []
        for problem in (first, second):
            leaves = [t.detach().requires_grad_(True) for t in (problem.h, *problem.params)]
            out = kernel(leaves[0], leaves[1:], problem.alpha, problem.mode)
            graphs.append((out, leaves, problem.grad_out))
        for i in order:
            grads = torch.autograd.grad(*graphs[i])
            for g, e in zip(grads, expected[i], strict=True):
                if not torch.allclose(g, e, rtol=1e-3, atol=1e-6, equal_nan=True):
                    return (
                        "a gradient changes when two forward passes come before their backward "
                        "passes: the kernel keeps state between calls"
                    )
    return ""


def without_gradients(kernel: Kernel, problem: Problem) -> str:
    """Under no_grad the output is the same and carries no graph."""
    expected = run(kernel, problem)[0]
    with torch.no_grad():
        out = kernel(problem.h, list(problem.params), problem.alpha, problem.mode)
    if out.requires_grad:
        return "the output asks for gradients under torch.no_grad()"
    scale = float(expected.abs().max())
    eps = torch.finfo(expected.dtype).eps
    if float((out - expected).abs().max()) > 8 * eps * scale:
        return "the output under torch.no_grad() differs from the one with gradients"
    return ""


def isolation(kernel: Kernel, problem: Problem) -> str:
    """In TRAINING the host sees h itself and its own gradient, whatever the seed does."""
    out, g_h, *_ = run(kernel, problem)
    if not same_bits(out, problem.h):
        return "in TRAINING the output is not h bit for bit"
    if out.untyped_storage().data_ptr() != problem.h.untyped_storage().data_ptr():
        return "in TRAINING the output is a copy of h, not h itself"
    if not same_bits(g_h, problem.grad_out):
        return "in TRAINING the gradient of h is not the gradient of out bit for bit"
    return ""


def identity(kernel: Kernel, problem: Problem) -> str:
    """At alpha 0 the output is h bit for bit, even where the seed gives infinities or NaN."""
    with torch.no_grad():
        plain = kernel(problem.h, list(problem.params), 0.0, problem.mode)
    if not same_bits(plain, problem.h):
        return f"at alpha 0 the output is not h bit for bit{_where(plain, problem.h)}"
    out, g_h, *_ = run(kernel, replace(problem, alpha=0.0))
    if not same_bits(out, problem.h):
        return f"at alpha 0 the output is not h bit for bit{_where(out, problem.h)}"
    # With the seed's input detached nothing of it can reach the host's gradient either.
    if problem.mode != FULL and not same_bits(g_h, problem.grad_out):
        return f"at alpha 0 the gradient of h is not that of out{_where(g_h, problem.grad_out)}"
    return ""


def _where(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f": shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    bits = _BITS[found.element_size()]
    differs = found.contiguous().view(bits) != expected.contiguous().view(bits)
    first = differs.flatten().nonzero()[0, 0]
    return (
        f": {int(differs.sum())} elements differ, the first is {float(found.flatten()[first])} "
        f"instead of {float(expected.flatten()[first])}"
    )


def settings() -> dict[str, object]:
    """What of this process every computation depends on, and no kernel may change."""
    tiny = torch.tensor(torch.finfo(torch.float32).smallest_normal)
    return {
        "torch's number of threads": torch.get_num_threads(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "the default element type": torch.get_default_dtype(),
        "whether oneDNN is used": torch.backends.mkldnn.enabled,
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        "whether denormal numbers are flushed to zero": bool(tiny / 2 == 0),
        "the state of the random numbers": hash(torch.get_rng_state().numpy().tobytes()),
    }


def changed(before: dict[str, object], after: dict[str, object]) -> str:
    """The reason where two readings of `settings` differ, or ""."""
    names = [name for name in before if before[name] != after[name]]
    return f"the kernel changes {names[0]}" if names else ""


def meddling(kernel: Kernel, problem: Problem) -> str:
    """Calls must leave the process as it was: torch's settings, and Python's clocks."""
    before = settings()
    run(kernel, problem)
    return changed(before, settings()) or replaced()


# Bytes that fresh memory is filled with: as numbers of any type they are large, and unlike.
_FILLS = (0xFE, 0x47)
_M_PERTURB = -6  # mallopt(3), of the GNU C library
CAN_POISON = platform.libc_ver()[0] == "glibc"


@contextlib.contextmanager
def poisoned(fill: int) -> Iterator[None]:
    """Every allocation starts out full of `fill` instead of what happens to be there.

    Fresh pages are zero, and so is much of what a short-lived process gets; a kernel that
    counts on it is right until it is not. Where the C library is not GNU's (`CAN_POISON`)
    nothing happens.
    """
    mallopt = ctypes.CDLL(None).mallopt if CAN_POISON else lambda *_: None
    mallopt(_M_PERTURB, fill ^ 0xFF)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def unwritten(kernel: Kernel, problem: Problem) -> str:
    """Results must not depend on what lay in memory before it was written to."""
    expected = run(kernel, problem)
    for fill in _FILLS:
        with poisoned(fill):
            found = run(kernel, problem)
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            if not torch.allclose(f, e, rtol=1e-3, atol=1e-6, equal_nan=True):
                what = ("the output", "the gradient of h", "a parameter's gradient")[min(i, 2)]
                return (
                    f"{what} depends on uninitialised memory: it changes when fresh memory is "
                    f"filled with 0x{fill:02X}"
                )
    return ""


@dataclass(frozen=True)
class _Traces:
    """What of this process is visible from outside its memory."""

    tasks: frozenset[str]
    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[str, str]]
    children: frozenset[str]
    files: frozenset[str]


def _traces(folder: Path | None) -> _Traces:
    gc.collect()
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    files = {str(p) for p in folder.rglob("*")} if folder else set()
    return _Traces(
        frozenset(os.listdir("/proc/self/task")),
        frozenset(threading.enumerate()),
        frozenset(descriptors),
        frozenset(_children()),
        frozenset(files),
    )


def _children() -> set[str]:
    own, found = str(os.getpid()), set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = Path("/proc", entry, "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            if status.rpartition(")")[2].split()[1] == own:
                found.add(entry)
    return found


def _cpu_ticks(tasks: frozenset[str]) -> int:
    ticks = 0
    for task in tasks:
        try:
            fields = Path("/proc/self/task", task, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks


def residue(kernel: Kernel, warm_up: Kernel, problem: Problem, folder: Path | None = None) -> str:
    """Calls must leave no thread, process, open file or file (in `folder`) behind.

    `warm_up` runs first, so that the pools torch itself makes are there. A compiled kernel
    may bring one OpenMP pool of its own: at most one sleeping thread per core, made once.
    """
    run(warm_up, problem)
    start = _traces(folder)
    run(kernel, problem)
    once = _traces(folder)
    for _ in range(4):
        run(kernel, problem)
    end = _traces(folder)
    if new := end.threads - start.threads:
        return f"the kernel leaves a thread behind: {sorted(t.name for t in new)}"
    pool = end.tasks - start.tasks
    cores = os.cpu_count() or 1
    if end.tasks - once.tasks or len(pool) > cores:
        return (
            f"the kernel leaves threads behind: {len(start.tasks)} before its calls, "
            f"{len(once.tasks)} after one, {len(end.tasks)} after five"
        )
    if pool and _busy(pool):
        return f"the kernel leaves {len(pool)} threads behind that keep computing"
    if opened := end.descriptors - start.descriptors:
        return f"the kernel leaves files open: {sorted(name for _, name in opened)}"
    if end.children - start.children:
        return "the kernel leaves a process behind"
    if made := end.files - start.files:
        return f"the kernel leaves files behind: {sorted(made)[:5]}"
    return ""


def _busy(tasks: frozenset[str]) -> bool:
    time.sleep(0.1)  # an OpenMP pool spins for a moment before it sleeps
    before = _cpu_ticks(tasks)
    time.sleep(0.1)
    return _cpu_ticks(tasks) - before >= 2
