"""The Triton kernels, interpreted on the CPU, compiled for GPUs, and run where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; it comes with a CUDA build of torch",
)


def run(module: str, *arguments: str, cache: Path, interpret: str) -> list[str]:
    # Triton reads TRITON_INTERPRET when its kernels are defined, so each way has its own process.
    done = subprocess.run(
        [sys.executable, "-m", f"tests.triton_kernels.{module}", *arguments], cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": interpret},
        capture_output=True, text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kernel", ["blend", "gated_mlp", "low_rank"])
def test_interpreted_against_float64(kernel: str, tmp_path: Path) -> None:
    lines = run("cases", "cpu", kernel, cache=tmp_path, interpret="1")
    assert len(lines) >= 19 and all(line.startswith(kernel) for line in lines)


@pytest.mark.slow
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    lines = run("compiled", cache=tmp_path, interpret="0")
    names = {tuple(line.split()[:2]) for line in lines}
    kernels = ("blend_forward", "blend_backward", "gate_forward", "gate_backward", "low_rank_map")
    assert names == {(arch, kernel) for arch in ("sm_80", "sm_90") for kernel in kernels}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["blend", "gated_mlp", "low_rank"])
def test_on_a_gpu_against_float64(kernel: str) -> None:
    from tests.triton_kernels.cases import ALL

    torch.manual_seed(0)
    with torch.cuda.stream(torch.cuda.Stream()):  # launches follow the current stream
        assert list(ALL[kernel]("cuda"))
