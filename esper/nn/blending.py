"""The native blend as a module."""

from __future__ import annotations

from torch import Tensor, nn

from esper.kasmina.blend import blend
from esper.kasmina.native import extension


class Blend(nn.Module):
    """h + alpha * (s - h) in one pass, with autograd; no parameters, so no state.

    At alpha = 0 and 1 the very tensor h or s is returned. `alpha` may be set at any time; it
    must stay within 0 and 1.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        return blend(h, s, self.alpha)

    @property
    def path(self) -> str:
        """ "native" with esper's extension, else "plain": torch.lerp."""
        return "plain" if extension() is None else "native"

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, path: {self.path}"
