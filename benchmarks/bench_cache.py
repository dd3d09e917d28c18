"""A hit in the kernel cache, beside what else remembers things; and what a miss costs.

Targets: 100 ns from Python, 60 ns inside C++. `dict`, `functools.lru_cache` and
`cachetools.LRUCache` are asked for the same keys in the same run; none of them is safe to evict
from, bounded by bytes, or knows what is in use. One call is far below a timer's resolution, so
each round is a loop of `CALLS`, and `extra_info["nanoseconds"]` is the median of a call with its
quartiles; the loop itself, under which no call from Python can be, is the limit.

A miss is everything: reading, digests, the checks in Python, opening. The kernel is a real one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import cachetools
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_open import IR, SITE
from esper.kasmina.artifact import OpenedKernel, open_artifact
from esper.kasmina.cache import _made, kernel_cache
from esper.leyline.artifact import Pipeline
from esper.tezzeret.compile import compile_artifact

CALLS, ROUNDS = 20_000, 60
LOOP = "Python's loop alone"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    content = compile_artifact(IR, SITE, pipeline=Pipeline.FAST)
    path = tmp_path_factory.mktemp("cache") / "kernel.esper"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def held(file: tuple[Path, str]) -> Iterator[tuple[Any, str, OpenedKernel]]:
    """The cache with one kernel in it, which somebody uses."""
    cache = kernel_cache()
    if cache is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    yield cache, file[1], open_artifact(*file, SITE)


def per_call(benchmark: BenchmarkFixture, contestant: str, loop: Callable[[], Any]) -> None:
    """Run `loop`, which makes `CALLS` calls, and note what one of them takes."""
    benchmark.group = "kernel cache, a hit"
    benchmark.pedantic(loop, rounds=ROUNDS, warmup_rounds=3)
    samples = np.array(benchmark.stats.stats.data) / CALLS * 1e9
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    benchmark.extra_info.update(
        contestant=contestant, limit=contestant == LOOP, calls=CALLS,
        nanoseconds=[float(middle), float(low), float(high)])
    print(f"\n{benchmark.name}: {middle:.1f} ns [{low:.1f}, {high:.1f}]")


def test_loop(benchmark: BenchmarkFixture) -> None:
    def loop() -> None:
        for _ in range(CALLS):
            pass

    per_call(benchmark, LOOP, loop)


def test_hit(benchmark: BenchmarkFixture, held: tuple[Any, str, OpenedKernel]) -> None:
    cache, digest, opened = held
    assert cache.find(digest) is opened.kernel

    def loop(cache: Any = cache, digest: str = digest) -> None:
        for _ in range(CALLS):
            cache.find(digest)

    per_call(benchmark, "esper, from Python", loop)


def test_hit_of_a_kernel_that_nobody_in_python_holds(
    benchmark: BenchmarkFixture, file: tuple[Path, str], held: tuple[Any, str, OpenedKernel]
) -> None:
    """The Python object has to be made; a seed that runs the kernel always holds one."""
    own = type(held[0])(max_bytes=1 << 30, max_count=4)
    sealed = own.read(str(file[0]), file[1]).wait()
    manifest = held[2].manifest
    own.open(sealed, list(manifest.backward_inputs), list(manifest.gradients),
             manifest.signature.device, manifest.signature.dtype.value).wait()

    def loop(cache: Any = own, digest: str = file[1]) -> None:
        for _ in range(CALLS):
            cache.find(digest)

    per_call(benchmark, "esper, of a kernel Python does not hold", loop)


def test_hit_inside_cpp(benchmark: BenchmarkFixture, held: tuple[Any, str, OpenedKernel]) -> None:
    """Lock, lookup, order of use, count, and a reference taken and given back."""
    cache, digest, _ = held
    per_call(benchmark, "esper, inside C++", lambda: cache.seconds_per_hit(digest, CALLS))


def test_dict(benchmark: BenchmarkFixture, held: tuple[Any, str, OpenedKernel]) -> None:
    _, digest, opened = held

    def loop(known: dict[str, Any] = {digest: opened.kernel}, digest: str = digest) -> None:  # noqa: B006
        for _ in range(CALLS):
            known[digest]

    per_call(benchmark, "dict", loop)


def test_lru_cache(benchmark: BenchmarkFixture, held: tuple[Any, str, OpenedKernel]) -> None:
    _, digest, opened = held

    @lru_cache(maxsize=256)
    def find(digest: str) -> Any:
        return opened.kernel

    def loop(find: Any = find, digest: str = digest) -> None:
        for _ in range(CALLS):
            find(digest)

    per_call(benchmark, "functools.lru_cache", loop)


def test_cachetools(benchmark: BenchmarkFixture, held: tuple[Any, str, OpenedKernel]) -> None:
    _, digest, opened = held
    known: Any = cachetools.LRUCache(maxsize=256)
    known[digest] = opened.kernel

    def loop(known: Any = known, digest: str = digest) -> None:
        for _ in range(CALLS):
            known[digest]

    per_call(benchmark, "cachetools.LRUCache", loop)


def test_open_a_kernel_that_is_cached(
    benchmark: BenchmarkFixture, file: tuple[Path, str], held: tuple[Any, str, OpenedKernel]
) -> None:
    """What a second model that grows the same kernel waits for: its manifest is parsed again."""
    benchmark.pedantic(open_artifact, args=(*file, SITE), rounds=200, warmup_rounds=5)


def test_miss(benchmark: BenchmarkFixture, file: tuple[Path, str]) -> None:
    if kernel_cache() is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")

    def forget() -> None:  # the next round finds a cache that has nothing, its threads not started
        _made.cache_clear()
        kernel_cache()

    benchmark.pedantic(open_artifact, args=(*file, SITE), rounds=50, warmup_rounds=3, setup=forget)
