"""How long it takes to open a kernel from disk, warm: target 10 ms, digest check included.

`read` is the part before any machine code is touched, as it is done without the extension
(reading, digests, zip, manifest); `open` is all of it, with the extension where it is built, and
without. What the cache makes of it is in bench_cache.py. Run: `pytest benchmarks/bench_open.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from esper.kasmina import native
from esper.kasmina.artifact import open_artifact, read_artifact
from esper.kasmina.cache import _made, kernel_cache
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.compile import compile_artifact

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=64)
IR = BlueprintIR(
    kind=SiteKind.FEATURES,
    nodes=(
        Node(id="norm", op=Op.LAYER_NORM, inputs=("h",)),
        Node(id="up", op=Op.LINEAR, inputs=("norm",), out=Width(times=4)),
        Node(id="act", op=Op.GELU, inputs=("up",)),
        Node(id="down", op=Op.LINEAR, inputs=("act",), out=C, init=Init.ZERO),
        Node(id="out", op=Op.ADD, inputs=("down", "h")),
    ),
    output="out",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    content = compile_artifact(IR, SITE, pipeline=Pipeline.FAST)
    path = tmp_path_factory.mktemp("open") / "kernel.esper"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def test_read_and_verify(benchmark: BenchmarkFixture, artifact: tuple[Path, str]) -> None:
    path, digest = artifact
    benchmark.extra_info["bytes"] = path.stat().st_size
    benchmark.pedantic(read_artifact, args=(path, digest), rounds=50, warmup_rounds=5)


@pytest.mark.parametrize("face", ["extension", "python"])
def test_open_a_kernel(
    benchmark: BenchmarkFixture, artifact: tuple[Path, str], monkeypatch: pytest.MonkeyPatch,
    face: str,
) -> None:
    path, digest = artifact
    if face == "python":
        monkeypatch.setenv(native.DISABLE, "1")
    for remembered in (native.extension, _made):
        remembered.cache_clear()

    def forget() -> None:  # every round opens the code anew, in a cache that has nothing
        _made.cache_clear()
        kernel_cache()

    try:
        if face == "extension" and kernel_cache() is None:
            pytest.skip("the extension is not built for this environment (see `esper doctor`)")
        benchmark.pedantic(open_artifact, args=(path, digest, SITE), rounds=50, warmup_rounds=5,
                           setup=forget)
    finally:
        for remembered in (native.extension, _made):
            remembered.cache_clear()
