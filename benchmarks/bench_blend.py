"""The blend beside torch's own ways to the same result, and beside what memory allows.

Two kinds of entries. The first time every contestant at sizes from 1 KiB to 256 MiB (a tensor;
three are moved), for the page's plots. The others are the ratios that targets are set for: both
sides in alternation, raw samples kept. All on every processor torch uses, in one process.

`torch.lerp_` writes into its input, so its peer is the blend that may write into the seed's
memory. `torch.lerp` allocates, as the plain blend does. The limit is a STREAM triad,
a = b + q * c into memory that is there: two tensors read, one written.

Run: `pytest benchmarks/bench_blend.py`, about a minute and a half on two processors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pairs import alternate, note_speed
from esper.kasmina.blend import blend, chosen

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 16 * KIB, 256 * KIB, 4 * MIB, 64 * MIB, 256 * MIB)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALPHA = 0.3
Call = Callable[[], Any]


def naive(h: Tensor, s: Tensor, alpha: float) -> Tensor:
    return h + alpha * (s - h)


@lru_cache(maxsize=1)
def compiled() -> Callable[[Tensor, Tensor, float], Tensor]:
    return torch.compile(naive, dynamic=True)


def tensors(size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three tensors of `size` bytes."""
    generator = torch.Generator().manual_seed(0)
    count = size // dtype.itemsize
    return [torch.randn(count, generator=generator).to(dtype) for _ in range(3)]


def forwards(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    h, s, out = tensors(size, dtype)
    return {
        "esper": lambda: blend(h, s, ALPHA),
        "esper into the seed": lambda: blend(h, s, ALPHA, reuse=True),
        "torch.lerp": lambda: torch.lerp(h, s, ALPHA),
        "torch.lerp_": lambda: s.lerp_(h, 1 - ALPHA),
        "h + a * (s - h)": lambda: naive(h, s, ALPHA),
        "torch.compile": lambda: compiled()(h, s, ALPHA),
        "triad": lambda: torch.add(h, s, alpha=ALPHA, out=out),
    }


def round_trips(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Forward and backward, both gradients wanted."""
    h, s, g = tensors(size, dtype)
    h.requires_grad_()
    s.requires_grad_()

    def through(function: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(h, s, ALPHA), (h, s), g)

    return {
        "esper": through(blend),
        "torch.lerp": through(torch.lerp),
        "h + a * (s - h)": through(naive),
        "torch.compile": through(lambda *of: compiled()(*of)),
    }


def chains(size: int) -> dict[str, Call]:
    """The same where h, s and the gradient are results: between two multiplications, which both
    sides do. Here the seed's memory, and the gradient's, can be written to."""
    x, y, g = tensors(size)
    x.requires_grad_()
    y.requires_grad_()

    def through(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(x * 0.5, y * 0.5) * 0.5, (x, y), g)

    return {
        "esper into the seed": through(lambda h, s: blend(h, s, ALPHA, reuse=True)),
        "torch.lerp": through(lambda h, s: torch.lerp(h, s, ALPHA)),
        "torch.lerp_": through(lambda h, s: s.lerp_(h, 1 - ALPHA)),
    }


def rounds_for(size: int) -> int:
    return max(7, min(100, (256 * MIB) // size))


def inner_for(size: int) -> int:
    return max(1, min(200, MIB // size))


def time(benchmark: Any, group: str, contestant: str, size: int, call: Call) -> None:
    benchmark.group = group
    benchmark.extra_info.update(
        contestant=contestant, size=size, size_unit="bytes of one tensor",
        limit=contestant == "triad", threads=torch.get_num_threads(),
    )
    benchmark.pedantic(call, rounds=rounds_for(size), iterations=inner_for(size), warmup_rounds=2)
    if contestant == "triad":
        rate = 3 * size / benchmark.stats.stats.median
        benchmark.extra_info["gigabytes_per_second"] = rate / 1e9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contestant", forwards(KIB))
def test_forward(benchmark: Any, contestant: str, size: int) -> None:
    time(benchmark, "blend, forward", contestant, size, forwards(size)[contestant])


@pytest.mark.parametrize("size", SIZES[:-1])
@pytest.mark.parametrize("contestant", round_trips(KIB))
def test_forward_and_backward(benchmark: Any, contestant: str, size: int) -> None:
    time(benchmark, "blend, forward and backward", contestant, size,
         round_trips(size)[contestant])


def beside(benchmark: Any, calls: dict[str, Call], ours: str, peer: str, size: int,
           dtype: torch.dtype, target: str) -> None:
    benchmark.extra_info.update(implementation=chosen(torch.device("cpu"), dtype),
                                threads=torch.get_num_threads())
    pair = alternate(calls[ours], calls[peer], rounds=rounds_for(size) + 14,
                     inner=inner_for(size))
    note_speed(benchmark, pair, peer=peer, target=target)
    info, what = benchmark.extra_info, benchmark.name.partition("[")[0].removeprefix("test_")
    label = f"{what.partition('_beside')[0].replace('_', ' ')}, {dtype}, {size // MIB} MiB"
    limit = " (memory's bandwidth)" if peer == "triad" else ""
    info["speedups"] = {f"blend, times as fast as {peer}{limit}": {
        label: [info["ratio"], info["low"], info["high"]]}}
    benchmark.pedantic(calls[ours], rounds=3)


@pytest.mark.parametrize("size", [64 * MIB, 256 * MIB])
def test_into_the_seed_beside_lerp_(benchmark: Any, size: int) -> None:
    beside(benchmark, forwards(size), "esper into the seed", "torch.lerp_", size, torch.float32,
           ">= 0.95")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB])
def test_forward_beside_lerp(benchmark: Any, size: int, dtype: torch.dtype) -> None:
    beside(benchmark, forwards(size, dtype), "esper", "torch.lerp", size, dtype, "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB])
def test_both_ways_beside_lerp(benchmark: Any, size: int, dtype: torch.dtype) -> None:
    beside(benchmark, round_trips(size, dtype), "esper", "torch.lerp", size, dtype,
           ">= 1.3" if size == 64 * MIB else "")


@pytest.mark.parametrize("peer", ["torch.lerp", "torch.lerp_"])
@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB])
def test_in_a_chain(benchmark: Any, size: int, peer: str) -> None:
    beside(benchmark, chains(size), "esper into the seed", peer, size, torch.float32, "")


def test_into_the_seed_beside_the_triad(benchmark: Any) -> None:
    beside(benchmark, forwards(64 * MIB), "esper into the seed", "triad", 64 * MIB,
           torch.float32, "")
