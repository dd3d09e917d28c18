"""Kernels that stand in for a whole module: nothing is blended, so nothing is kept at alpha 0."""

from __future__ import annotations

from torch import Tensor

from esper.leyline.reference import apply
from esper.urabrask.proof import prove
from tests.urabrask.test_proof import FEATURES, SITE


def test_a_standalone_kernel_knows_no_alpha() -> None:
    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        return apply(FEATURES, SITE, h, params)

    alone = SITE.model_copy(update={"standalone": True})
    proof = prove(kernel, FEATURES, alone)
    assert proof.accepted, proof.reason
    assert all("alpha 1, FULL" in c.name for c in proof.cases if c.name.startswith("batch"))
    assert not prove(kernel, FEATURES, SITE).accepted

    def wrong(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        return kernel(h, params, alpha, mode) * (1 + 1e-5)

    assert "output: error" in prove(wrong, FEATURES, alone).reason
