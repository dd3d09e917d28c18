"""The native blend as a module."""

from __future__ import annotations

from torch import Tensor, nn

from esper.kasmina.blend import blend


class Blend(nn.Module):
    """h + alpha * (s - h) in one pass, with autograd; no parameters, so no state.

    At alpha = 0 and 1 the very tensor h or s is returned. `alpha` may be set at any time; it
    must stay within 0 and 1. What computes it depends on the tensors and on ESPER_BLEND:
    `esper.kasmina.blend.chosen(h.device, h.dtype)` tells.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        return blend(h, s, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"
