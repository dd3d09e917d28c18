"""The kernel cache and the system: what eviction unmaps, and what a fork leaves usable."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.hollow import artifact, digest_of, load, opening

ROOT = Path(__file__).parents[2]


_EVICT = """
import gc, sys, time
from pathlib import Path
from esper.kasmina import native
from tests.hollow import artifact, load
extension = native.extension()
cache = extension.KernelCache(max_bytes=1 << 20, max_count=4)
path, digest = artifact(Path(sys.argv[1]), "a")
mapped = lambda: sum("esper-kernel-" in line for line in open("/proc/self/maps"))
kernel = load(cache, path, digest)
assert mapped(), "the code of an opened kernel is mapped"
assert not cache.evict(digest), "a kernel that is held was evicted"
del kernel
for _ in range(1000):
    gc.collect()
    if cache.evict(digest):
        break
    time.sleep(0.005)
assert cache.find(digest) is None
assert not mapped(), "the code of an evicted kernel is still mapped"
"""


def run(program: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_eviction_unmaps_the_code(extension: Any, tmp_path: Path) -> None:
    run(_EVICT, str(tmp_path))


_EVICT_REAL = """
import hashlib, sys, threading, time
from pathlib import Path
from esper.kasmina import native
from tests.hollow import artifact, load
KernelCache = native.extension().KernelCache
mapped = lambda: [line for line in open("/proc/self/maps") if "esper-kernel-" in line]
def come_and_go(path, digest):
    # The cache's threads ran the code that makes a model, this one runs what deletes it.
    cache = KernelCache(max_bytes=1 << 30, max_count=4)
    load(cache, path, digest)
    assert mapped()
    while not cache.evict(digest):
        time.sleep(0.005)
path = Path(sys.argv[1])
kernels = [(path, hashlib.sha256(path.read_bytes()).hexdigest()),
           artifact(Path(sys.argv[2]), "other")]
for kernel in kernels:
    thread = threading.Thread(target=come_and_go, args=kernel)
    thread.start()
    thread.join()
assert not mapped(), mapped()
"""


@pytest.mark.slow
def test_eviction_unmaps_what_inductor_compiled(
    extension: Any, feature_artifact: Path, tmp_path: Path
) -> None:
    """Once the threads that ran it have ended, and another library is closed: see cache.py."""
    run(_EVICT_REAL, str(feature_artifact), str(tmp_path))


class _Kernels(Dataset[int]):
    """A data set whose items say whether the caches work where they are made."""

    def __init__(self, cache: Any, path: Path, digest: str, other: tuple[Path, str]) -> None:
        self.cache, self.path, self.digest, self.other = cache, path, digest, other

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        known = self.cache.find(self.digest) is not None
        return int(known and load(self.cache, *self.other) is not None)


def test_the_workers_of_a_data_loader_can_use_it(
    extension: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are forked while threads of the parent are loading, and while others look up."""
    monkeypatch.setenv("HOLLOW_MILLISECONDS", "2")
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=8)
    path, digest = artifact(tmp_path, "a")
    kernel = load(cache, path, digest)
    stop = threading.Event()

    def churn(tag: str) -> None:
        while not stop.is_set():
            cache.find(digest)
            cache.evict(digest_of(tmp_path, tag))
            load(cache, *artifact(tmp_path, tag))

    threads = [threading.Thread(target=churn, args=(tag,)) for tag in "xy"]
    for tag in "xy":
        artifact(tmp_path, tag)
    for thread in threads:
        thread.start()
    try:
        data = _Kernels(cache, path, digest, artifact(tmp_path, "b"))
        for _ in range(8):
            loader = DataLoader(data, batch_size=2, num_workers=2, timeout=60,
                                multiprocessing_context=multiprocessing.get_context("fork"))
            assert torch.cat(list(loader)).tolist() == [1] * 8
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert cache.find(digest) is kernel


def test_a_child_is_told_that_its_parents_load_is_not_its_own(
    extension: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLLOW_MILLISECONDS", "500")
    cache = extension.KernelCache(max_bytes=1 << 20, max_count=8)
    pending = opening(cache, *artifact(tmp_path, "a"))
    pid = os.fork()
    if pid == 0:
        try:
            pending.wait()
        except RuntimeError as e:
            os._exit(0 if "before the process was forked" in str(e) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pending.wait() is not None
