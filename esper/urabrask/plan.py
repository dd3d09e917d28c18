"""How long and how widely a kernel is measured."""

from __future__ import annotations

from pydantic import Field

from esper.leyline.base import Contract
from esper.leyline.signature import SiteKind, SiteSignature


class Plan(Contract):
    """The defaults suit a pipeline that must go on beside a training run.

    `seconds` is the budget of the comparison at one shape; single calls take at most half of
    that again. `thorough` is for people who wait: more batch sizes, and torch.compile.
    """

    seconds: float = Field(default=2.0, gt=0)
    calls: int = Field(default=120, ge=10)  # a 99th percentile needs a hundred
    thorough: bool = False

    def shapes(self, signature: SiteSignature) -> tuple[tuple[int, int], ...]:
        """(batch, space) that are measured, the largest last."""
        match signature.kind:
            case SiteKind.FEATURES:
                space, short, long = (8, 8), (16, 256), (1, 16, 64, 256)
            case SiteKind.TOKENS:
                space, short, long = (16, 64), (4, 16), (1, 4, 16, 32)
            case SiteKind.MAP:
                space, short, long = (8, 16), (4, 16), (1, 4, 16, 32)
        if self.thorough:
            return tuple((batch, space[1]) for batch in long)
        return tuple(zip(short, space, strict=True))


QUICK = Plan()
THOROUGH = Plan(seconds=4.0, calls=1000, thorough=True)
