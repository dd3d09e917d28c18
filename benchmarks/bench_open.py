"""How long it takes to open a kernel from disk, warm: target 10 ms, digest check included.

`read` is the part before any machine code is touched (reading, digests, zip, manifest);
`open` is all of it. Run: `pytest benchmarks/bench_open.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from esper.kasmina.artifact import open_artifact, read_artifact
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


def test_open_a_kernel(benchmark: BenchmarkFixture, artifact: tuple[Path, str]) -> None:
    path, digest = artifact
    # Every opening maps its code anew and keeps it mapped while the kernel lives; the results
    # are dropped, so that memory does not grow with the rounds.
    benchmark.pedantic(open_artifact, args=(path, digest, SITE), rounds=50, warmup_rounds=5)
