"""The kernel cache: what it keeps, what it lets go, what it refuses, and whom it makes wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.errors import ArtifactCorrupt, ArtifactMismatch, CacheFull, ConfigError
from esper.kasmina import cache as room
from esper.kasmina import native
from esper.kasmina.artifact import open_artifact
from tests.hollow import (
    SITE,
    artifact,
    code_bytes,
    digest_of,
    eventually,
    load,
    opening,
)


@pytest.fixture
def make(extension: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`make(cache, tag)` puts a hollow kernel into a cache and returns it."""

    def make(cache: Any, tag: str, **changes: Any) -> Any:
        return load(cache, *artifact(tmp_path, tag, **changes))

    yield make


def settled(cache: Any, **expected: float) -> dict[str, float]:
    found = cache.statistics()
    assert {name: found[name] for name in expected} == expected
    return dict(found)


# -- keeping -------------------------------------------------------------------------------


def test_a_kernel_is_read_and_opened_once(extension: Any, make: Any, tmp_path: Path) -> None:
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
    assert cache.find("0" * 64) is None
    kernel = make(cache, "a")
    assert cache.find(digest_of(tmp_path, "a")) is kernel
    assert make(cache, "a") is kernel
    found = settled(cache, hits=2, misses=1, loads=1, failures=0, evictions=0, resident_count=1,
                    resident_bytes=code_bytes("a"))
    assert 0 < found["longest_load_seconds"] == found["load_seconds"] < 10


def test_the_least_recently_used_goes_first(extension: Any, make: Any, tmp_path: Path) -> None:
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=3)
    for tag in "abc":
        make(cache, tag)
    assert eventually(lambda: cache.find(digest_of(tmp_path, "a")) is not None)  # now b is oldest
    make(cache, "d")
    here = [tag for tag in "abcd" if cache.find(digest_of(tmp_path, tag)) is not None]
    assert here == ["a", "c", "d"]
    settled(cache, evictions=1, resident_count=3, loads=4)


def test_the_bound_by_bytes_evicts_as_many_as_it_takes(
    extension: Any, make: Any, tmp_path: Path
) -> None:
    small = code_bytes("a")
    cache = extension.KernelCache(max_bytes=3 * small, max_count=99)
    for tag in "abc":
        make(cache, tag)
    make(cache, "d", size=2 * small)
    here = [tag for tag in "abcd" if cache.find(digest_of(tmp_path, tag)) is not None]
    assert here == ["c", "d"]
    settled(cache, evictions=2, resident_bytes=3 * small)


def test_a_kernel_in_use_stays_and_a_cache_full_of_them_says_so(
    extension: Any, make: Any, tmp_path: Path
) -> None:
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=2)
    held = [make(cache, "a"), make(cache, "b")]
    with pytest.raises(CacheFull, match=r"of 2 kernels .* all but 0 are in use.*limits are 2"):
        make(cache, "c")
    assert not cache.evict(digest_of(tmp_path, "a"))
    settled(cache, failures=1, evictions=0, resident_count=2)
    del held[0]
    assert eventually(lambda: bool(_try(lambda: make(cache, "c"))))
    assert cache.find(digest_of(tmp_path, "b")) is held[0]
    assert cache.find(digest_of(tmp_path, "a")) is None


def _try(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except CacheFull:
        return None


def test_one_that_can_never_fit_evicts_nobody(extension: Any, make: Any) -> None:
    cache = extension.KernelCache(max_bytes=2 * code_bytes("a"), max_count=9)
    make(cache, "a")
    with pytest.raises(CacheFull, match="raise ESPER_CACHE_BYTES"):
        make(cache, "b", size=3 * code_bytes("a"))
    settled(cache, resident_count=1, evictions=0)


def test_a_failed_load_leaves_nothing(extension: Any, tmp_path: Path) -> None:
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
    path, digest = artifact(tmp_path, "a")
    sealed = cache.read(str(path), digest).wait()
    for _ in range(2):  # the second finds no trace of the first
        with pytest.raises(ValueError, match="cannot read nonsense"):
            cache.open(sealed, ["nonsense"], [0], "cpu", "float32").wait()
    assert cache.find(digest) is None
    settled(cache, failures=2, loads=0, resident_count=0, resident_bytes=0)
    assert load(cache, path, digest) is not None
    with pytest.raises(ArtifactCorrupt):
        cache.read(str(path), "0" * 64).wait()
    with pytest.raises(FileNotFoundError):
        cache.read(str(tmp_path / "gone"), "1" * 64).wait()
    (tmp_path / "gone").write_bytes(path.read_bytes())
    assert cache.read(str(tmp_path / "gone"), digest).wait() is not None


# -- threads -------------------------------------------------------------------------------


def test_one_load_however_many_ask(
    extension: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLLOW_MILLISECONDS", "50")
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4, threads=4)
    path, digest = artifact(tmp_path, "a")
    found: list[Any] = []
    barrier = threading.Barrier(16)

    def ask() -> None:
        barrier.wait()
        found.append(load(cache, path, digest))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(map(id, found))) == 1
    settled(cache, loads=1, resident_count=1)


def test_readers_of_one_digest_share_the_reading(extension: Any, tmp_path: Path) -> None:
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
    path, digest = artifact(tmp_path, "a")
    first = cache.read(str(path), digest)
    assert cache.read(str(path), digest) is first
    sealed = first.wait()
    path.unlink()
    assert cache.read(str(path), digest).wait() is sealed
    del first, sealed
    assert eventually(lambda: _is_gone(cache, path, digest))


def _is_gone(cache: Any, path: Path, digest: str) -> bool:
    try:
        cache.read(str(path), digest).wait()
    except FileNotFoundError:
        return True
    return False


def test_loading_never_holds_the_gil(
    extension: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two waits of 400 ms in the library's code, and Python goes on all the while."""
    monkeypatch.setenv("HOLLOW_MILLISECONDS", "400")
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
    pending = opening(cache, *artifact(tmp_path, "a"))
    longest, last = 0.0, time.perf_counter()
    while not pending.done():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert settled(cache, loads=1)["load_seconds"] >= 0.8
    assert longest < 0.4  # one wait under the GIL would have shown
    waiter = threading.Thread(target=lambda: opening(cache, *artifact(tmp_path, "b")).wait())
    ticks = 0
    waiter.start()
    while waiter.is_alive():
        ticks += 1
        time.sleep(0.005)
    assert ticks > 10


# -- one cache for all of Python -----------------------------------------------------------


@pytest.fixture(params=["extension", "python"])
def face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        monkeypatch.setenv(native.DISABLE, "1")
    native.extension.cache_clear()
    room._made.cache_clear()
    if request.param == "extension" and native.extension() is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    yield request.param
    native.extension.cache_clear()
    room._made.cache_clear()


def test_opening_and_its_refusals(face: str, tmp_path: Path) -> None:
    path, digest = artifact(tmp_path, "a")
    opened = open_artifact(path, digest, SITE)
    assert opened.manifest.signature == SITE and opened.ir.id == opened.manifest.blueprint_id
    again = open_artifact(path, digest, SITE, opened.manifest)
    assert (again.kernel is opened.kernel) == (face == "extension")
    assert (again.manifest, again.ir) == (opened.manifest, opened.ir)

    # Whether it is in the cache or not, what is not wanted is refused.
    other = SITE.model_copy(update={"channels": 16})
    with pytest.raises(ArtifactMismatch, match="the site is"):
        open_artifact(path, digest, other)
    lie = opened.manifest.model_copy(update={"flops": 2, "compile_seconds": 9.0})
    with pytest.raises(ArtifactMismatch, match="differ in compile_seconds, flops"):
        open_artifact(path, digest, SITE, lie)
    with pytest.raises(ArtifactCorrupt, match="SHA-256"):
        open_artifact(path, "0" * 64, SITE)
    with pytest.raises(FileNotFoundError):
        open_artifact(tmp_path / "gone", "0" * 64, SITE)
    for changes, refusal in (
        ({"torch_build": "1.0.0"}, ArtifactMismatch), ({"isa": "ALTIVEC"}, ArtifactMismatch),
        ({"kernel_id": "k-0"}, ArtifactCorrupt), ({"gradients": (0,)}, ArtifactCorrupt),
        ({"sha256": {}}, ArtifactCorrupt), ({"blueprint_id": "bp-0"}, ArtifactCorrupt),
    ):
        with pytest.raises(refusal):
            open_artifact(*artifact(tmp_path, "lie", **changes), SITE)


def test_nothing_of_a_refused_artifact_is_opened(
    face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code would take a minute: whoever gets to it does not come back in time."""
    monkeypatch.setenv("HOLLOW_MILLISECONDS", "60000")
    started = time.monotonic()
    for changes in ({"torch_build": "1.0.0"}, {"isa": "ALTIVEC"}, {"kernel_id": "k-0"}):
        with pytest.raises((ArtifactCorrupt, ArtifactMismatch)):
            open_artifact(*artifact(tmp_path, "lie", **changes), SITE)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("limit", ["0", "-1", "1e9", "many", "99999999999999999999"])
def test_a_limit_that_is_none_is_refused(
    extension: Any, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv(room.KERNELS, limit)
    room._made.cache_clear()
    try:
        with pytest.raises(ConfigError, match=room.KERNELS):
            room.kernel_cache()
    finally:
        room._made.cache_clear()


def test_the_limits_are_those_of_the_environment(
    face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(room.KERNELS, "1")
    held = open_artifact(*artifact(tmp_path, "a"), SITE)
    if face == "python":  # keeps nothing, and bounds nothing
        assert open_artifact(*artifact(tmp_path, "b"), SITE).kernel is not held.kernel
    else:
        with pytest.raises(CacheFull, match="ESPER_CACHE_KERNELS"):
            open_artifact(*artifact(tmp_path, "b"), SITE)


def test_threads_that_come_first_get_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Slow:
        def __init__(self, **limits: int) -> None:
            time.sleep(0.2)
            made.append(self)

    room._made.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(native, "extension", lambda: SimpleNamespace(KernelCache=Slow))
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(lambda _: room.kernel_cache(), range(4)))
        assert found == made * 4
    finally:
        room._made.cache_clear()
