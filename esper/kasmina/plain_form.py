"""A blueprint as a kernel in plain torch, for where its compiled form is not to be had.

It keeps the contract of a compiled kernel: called with (h, params, alpha, mode), the same outputs
and gradients but for rounding. It is slower, allocates, and can be used nowhere but in an eager
host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.mode import GRAFTING, TRAINING
from esper.leyline.reference import blend, function, isolated
from esper.leyline.signature import SiteSignature


class PlainForm:
    """Callable as `artifact.Kernel`."""

    def __init__(self, ir: BlueprintIR, signature: SiteSignature) -> None:
        self._run = function(ir, signature)
        self._dtype = getattr(torch, signature.dtype)

    def __call__(self, h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if mode != TRAINING and alpha == 0.0:
            return h
        inside = h.detach() if mode == GRAFTING else h
        if mode == TRAINING:  # what the host does to its tensor next must not reach the seed
            inside = h.detach().clone()
        # As compiled code does: in its own element type, whatever autocast made of the site.
        with torch.autocast(h.device.type, enabled=False):
            out = self._run(inside.to(self._dtype), params).to(h.dtype)
        if mode == TRAINING:
            return isolated(h, out)
        return blend(h, out, torch.full((), alpha, device=h.device))
