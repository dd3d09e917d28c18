"""Real cubins of Triton's templates: compiled without a GPU, checked, packed, refused."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from esper.errors import ConfigError, NoBackend
from esper.kasmina.artifact import read_artifact
from esper.leyline.artifact import CUBINS, PLAN, Pipeline
from esper.leyline.base import sha256
from esper.leyline.launch import parse_plan
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.tezzeret.compile import compile_artifact
from esper.tezzeret.cubins import TritonTemplates
from esper.tezzeret.inductor import InductorCuda
from esper.tezzeret.workshop import CUDA_ARCH, backend_for, backends
from tests.support import bottleneck
from tests.tezzeret.templates import gated, low_rank

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not TRITON, reason="triton is not installed; it comes with a CUDA build of torch")
SITE = SiteSignature(kind=SiteKind.FEATURES, channels=48, device="cuda")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"),
                         [("sm_80", DType.FLOAT32), ("sm_90", DType.BFLOAT16)])
def test_every_pipeline_compiles_for_gpus_that_are_not_here(
    arch: str, dtype: DType, tmp_path: Path
) -> None:
    from triton.backends import nvidia

    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    signature = SITE.model_copy(update={"dtype": dtype})
    seen = set()
    for pipeline in Pipeline:
        ir = gated(SiteKind.FEATURES, bias=True) if pipeline is Pipeline.STANDARD else low_rank(
            SiteKind.FEATURES, rank=64)
        built = TritonTemplates(arch).build(ir, signature, pipeline, tmp_path)
        plan = parse_plan(built.code[PLAN], built.code[CUBINS])  # checks each cubin, see there
        assert plan.arch == arch
        for kernel in plan.kernels:
            code = built.code[CUBINS][kernel.offset : kernel.offset + kernel.bytes]
            (tmp_path / "one.cubin").write_bytes(code)
            said = subprocess.run([cuobjdump, "-res-usage", tmp_path / "one.cubin"], check=True,
                                  capture_output=True, text=True, timeout=60).stdout
            found = re.search(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", said)
            assert found is not None, said
            assert (found[1], int(found[2]), int(found[3])) == (
                kernel.name, kernel.registers, kernel.stack), "NVIDIA's own tool agrees"
            seen.add(kernel.name)
    assert seen >= {"low_rank_map", "gate_forward", "gate_backward", "combine", "product",
                    "column_sum", "rms_norm_forward", "rms_norm_backward"}


@needs_triton
@pytest.mark.slow
def test_the_forge_packs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUDA_ARCH, "sm_90")
    ir = low_rank(SiteKind.FEATURES, bias=True)
    content = compile_artifact(ir, SITE)
    path = tmp_path / "kernel.esper"
    path.write_bytes(content)
    artifact = read_artifact(path, sha256(content))
    made = artifact.manifest.toolchain
    assert made.isa == "sm_90" and made.compiler.startswith("triton ")
    assert json.loads(artifact.code[PLAN])["arch"] == "sm_90"
    assert str(tmp_path.home()).encode() not in artifact.code[CUBINS], "no paths of this machine"


def test_backends_are_chosen_by_device_and_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.tezzeret import workshop

    on_cpu = SITE.model_copy(update={"device": "cpu"})
    low = low_rank(SiteKind.FEATURES)
    monkeypatch.setattr(workshop, "gpu_arch", lambda: None)
    workshop._backends.cache_clear()
    try:
        monkeypatch.delenv(CUDA_ARCH, raising=False)
        assert backend_for(low, on_cpu).name == "inductor"
        with pytest.raises(NoBackend, match="no backend of this worker compiles low rank 4"):
            backend_for(low, SITE)
        monkeypatch.setenv(CUDA_ARCH, "sm_80")
        assert backend_for(low, SITE).name == "triton templates"
        assert backend_for(low, on_cpu).name == "inductor"
        with pytest.raises(NoBackend, match="no Triton template computes bottleneck"):
            backend_for(bottleneck(SiteKind.FEATURES), SITE)
        monkeypatch.setenv(CUDA_ARCH, "sm_61")
        with pytest.raises(ConfigError, match="must be one of sm_80, sm_90"):
            backends()
        # Where there is a GPU, what no template computes is Inductor's.
        monkeypatch.delenv(CUDA_ARCH)
        monkeypatch.setattr(workshop, "gpu_arch", lambda: "sm_90")
        monkeypatch.setattr(workshop.InductorCuda, "why_not", lambda *_: "")
        workshop._backends.cache_clear()
        assert backend_for(bottleneck(SiteKind.FEATURES), SITE).name == "inductor for cuda"
    finally:
        workshop._backends.cache_clear()


def test_inductor_says_what_it_lacks_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.tezzeret import inductor

    monkeypatch.setattr(inductor, "gpu_arch", lambda: None)
    assert "there is no GPU here" in InductorCuda().why_not(low_rank(SiteKind.FEATURES), SITE)
