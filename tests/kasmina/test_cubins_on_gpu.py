"""Kernels compiled for a CUDA device, opened and trained on it, for whoever has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.kasmina.artifact import open_artifact
from esper.leyline.artifact import Pipeline
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.launch import SHARED_LIMITS
from esper.leyline.reference import initial_parameters
from esper.leyline.signature import DType, SiteKind
from esper.tezzeret.compile import compile_artifact
from tests.support import bottleneck
from tests.tezzeret.followed import FULL, GRAFTING, TRAINING, check, signature_of
from tests.tezzeret.templates import gated, low_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("pipeline", Pipeline)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize("ir", [low_rank(SiteKind.TOKENS, rank=17, bias=True),
                                gated(SiteKind.TOKENS), bottleneck(SiteKind.TOKENS)])
def test_output_and_gradients(
    ir: BlueprintIR, dtype: DType, pipeline: Pipeline, tmp_path: Path
) -> None:
    """The first two are Triton's templates, the last is Inductor's."""
    major, minor = torch.cuda.get_device_capability()
    if ir.name != "bottleneck" and f"sm_{major}{minor}" not in SHARED_LIMITS:
        pytest.skip(f"no template is compiled for sm_{major}{minor}")
    torch.manual_seed(0)
    for channels in (33, 64):
        signature = signature_of((1, 1), channels, dtype)
        content = compile_artifact(ir, signature, pipeline)
        path = tmp_path / f"{channels}.esper"
        path.write_bytes(content)
        kernel = open_artifact(path, sha256(content), signature).kernel
        params = [(p + 0.3 * torch.randn(p.shape).to(p.dtype)).cuda()
                  for p in initial_parameters(ir, signature)]
        for lead in ((1, 1), (3, 41), (64, 9)):
            h = torch.randn(*lead, channels).to("cuda", getattr(torch, dtype))
            with torch.cuda.stream(torch.cuda.Stream()):  # launches follow the current stream
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                for alpha, mode in ((1.0, TRAINING), (0.3, GRAFTING), (0.3, FULL), (1.0, FULL)):
                    check(kernel, ir, signature, h, params, alpha, mode)
                torch.cuda.synchronize()
