"""The Triton blend, interpreted on the CPU and compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; it comes with a CUDA build of torch",
)

# Triton reads TRITON_INTERPRET when its kernels are defined, so each way has its own process.
INTERPRETED = """
import torch
from esper.triton_kernels.blend import blend

torch.manual_seed(0)
half_ulp = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
for dtype, tolerance in half_ulp.items():
    for shape in ((1,), (7, 3), (1024,), (5, 1025), (0, 3)):
        h = torch.randn(shape).to(dtype).requires_grad_()
        s = torch.randn(shape).to(dtype).requires_grad_()
        grad = torch.randn(shape).to(dtype)
        out = blend(h, s, 0.3)
        g_h, g_s = torch.autograd.grad(out, (h, s), grad)
        wanted = torch.lerp(h.double(), s.double(), 0.3)
        for got, want in ((out, wanted), (g_h, 0.7 * grad.double()), (g_s, 0.3 * grad.double())):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
h, s = torch.randn(4, 3), torch.randn(4, 3)
torch.testing.assert_close(blend(h.T, s.T, 0.5), torch.lerp(h.T, s.T, 0.5))
assert blend(h, s, 0.0) is h and blend(h, s, 1.0) is s
print("equal")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esper.triton_kernels.blend import blend_backward, blend_forward

for arch in (80, 90):
    for kernel in (blend_forward, blend_backward):
        names = kernel.arg_names
        types = ["*bf16"] * 3 + ["*fp64", "i64"]
        signature = dict(zip(names, [*types, "constexpr", "constexpr"]))
        source = ASTSource(kernel, signature, constexprs={"WIDE": False, "BLOCK": 1024})
        code = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
        assert code[:4] == b"\\x7fELF", code[:4]
        print(f"sm_{arch}", kernel.__name__, len(code))
"""


def run(source: str, tmp_path: Path, **environment: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_equals_torch(tmp_path: Path) -> None:
    assert run(INTERPRETED, tmp_path, TRITON_INTERPRET="1").strip() == "equal"


def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    lines = run(COMPILED, tmp_path, TRITON_INTERPRET="0").split("\n")
    assert [line.split()[:2] for line in lines if line] == [
        [arch, name] for arch in ("sm_80", "sm_90") for name in ("blend_forward", "blend_backward")
    ]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from esper.triton_kernels.blend import blend

    h = torch.randn(1000, 33, device="cuda", requires_grad=True)
    s = torch.randn(1000, 33, device="cuda", requires_grad=True)
    out = blend(h, s, 0.3)
    torch.testing.assert_close(out, torch.lerp(h, s, 0.3))
    g_h, g_s = torch.autograd.grad(out.sum(), (h, s))
    torch.testing.assert_close(g_h, torch.full_like(h, 0.7))
    torch.testing.assert_close(g_s, torch.full_like(s, 0.3))
