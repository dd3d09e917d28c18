"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def feature_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact for a features site of 32 channels, compiled once per test session.

    Takes tens of seconds and a C++ compiler: tests that use it are marked slow.
    """
    from esper.leyline.artifact import Pipeline
    from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
    from esper.leyline.signature import SiteKind, SiteSignature
    from esper.tezzeret.compile import compile_artifact

    ir = BlueprintIR(
        kind=SiteKind.FEATURES,
        nodes=(
            Node(id="norm", op=Op.LAYER_NORM, inputs=("h",)),
            Node(id="up", op=Op.LINEAR, inputs=("norm",), out=Width(times=2)),
            Node(id="act", op=Op.RELU, inputs=("up",)),
            Node(id="down", op=Op.LINEAR, inputs=("act",), out=C, init=Init.ZERO),
            Node(id="out", op=Op.ADD, inputs=("down", "h")),
        ),
        output="out",
    )
    site = SiteSignature(kind=SiteKind.FEATURES, channels=32)
    path = tmp_path_factory.mktemp("artifact") / "features.esper"
    path.write_bytes(compile_artifact(ir, site, pipeline=Pipeline.FAST))
    return path


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tests.kernels.Kernels`, shared: tests that use it are marked slow."""
    from tests.kernels import Kernels

    return Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def extension() -> Any:
    """`esper._C`; without it the test is skipped, and says so."""
    from esper.kasmina import native

    found = native.extension()
    if found is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    return found
