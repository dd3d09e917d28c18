"""Which blueprints Triton's templates compute, and that the launches planned for them are right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.errors import CompileError
from esper.karn.templates import templates_for
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import INPUT, BlueprintIR, C, Node, Op
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.tezzeret.programs import match, program
from tests.tezzeret.templates import gated, low_rank

ROOT = Path(__file__).parents[2]


def site(kind: SiteKind = SiteKind.FEATURES, **fields: object) -> SiteSignature:
    return SiteSignature(kind=kind, channels=16, device="cuda", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [SiteKind.FEATURES, SiteKind.TOKENS])
def test_of_karns_templates_two_have_one_of_tritons(kind: SiteKind) -> None:
    taken = []
    for ir in templates_for(site(kind)):
        try:
            program(ir, site(kind), Pipeline.FAST)
        except CompileError:
            continue
        taken.append(ir.name)
    assert sorted(taken) == ["gated", "low rank"]


def test_what_is_nearly_a_template_is_refused() -> None:
    features = SiteKind.FEATURES
    twice = BlueprintIR(  # its gate is its own factor
        kind=features,
        nodes=(Node(id="a", op=Op.LINEAR, inputs=(INPUT,), out=C),
               Node(id="s", op=Op.SILU, inputs=("a",)),
               Node(id="m", op=Op.MUL, inputs=("s", "a")),
               Node(id="d", op=Op.LINEAR, inputs=("m",), out=C),
               Node(id="o", op=Op.ADD, inputs=(INPUT, "d"))),
        output="o",
    )
    no_residual = BlueprintIR(
        kind=features,
        nodes=(Node(id="a", op=Op.LINEAR, inputs=(INPUT,), out=C, bias=False),
               Node(id="b", op=Op.LINEAR, inputs=("a",), out=C)),
        output="b",
    )
    doubled = BlueprintIR(
        kind=features, nodes=(Node(id="o", op=Op.ADD, inputs=(INPUT, INPUT)),), output="o")
    for ir in (twice, no_residual, doubled, low_rank(features, rank=65)):
        with pytest.raises(CompileError, match="no Triton template computes"):
            match(ir, site())
    for signature in (site(dtype=DType.FLOAT64), site(standalone=True)):
        with pytest.raises(CompileError, match="are for seeds at features and tokens"):
            match(gated(features), signature)
    with pytest.raises(CompileError, match="are for seeds at features and tokens"):
        match(gated(SiteKind.MAP), site(SiteKind.MAP))


def test_pipelines_differ() -> None:
    made = {program(gated(SiteKind.TOKENS), site(SiteKind.TOKENS), p).forms for p in Pipeline}
    assert len(made) == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="triton is not installed; it comes with a CUDA build of torch")
def test_followed_by_the_extension_with_kernels_interpreted(
    tmp_path: Path, extension: object
) -> None:
    """Grids, strides, packing, buffers, modes and gradients, over odd sizes; see `followed`."""
    # Triton reads TRITON_INTERPRET when its kernels are defined, so this has its own process.
    done = subprocess.run(
        [sys.executable, "-m", "tests.tezzeret.followed"], cwd=ROOT, timeout=900, check=False,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 22
    assert all(int(line.rpartition(" ")[2]) >= 5 for line in lines[:20])
