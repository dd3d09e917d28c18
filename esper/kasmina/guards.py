"""Guards: what makes a seed that is being blended in leave again. One strategy each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Health:
    """What was last measured of a seed. None means not measured, never healthy.

    `drift` is |blended - h| / |h| over the last sampled batch; `grad_norm` the 2-norm of the
    gradient of all its parameters.
    """

    drift: float | None = None
    grad_norm: float | None = None


class Guard(Protocol):
    """Returns the reason to cull, or None."""

    def __call__(self, health: Health) -> str | None: ...


@dataclass(frozen=True)
class DriftGuard:
    """The site's output may not move by more than `limit` times its own size."""

    limit: float = 2.0

    def __call__(self, health: Health) -> str | None:
        if health.drift is None or health.drift <= self.limit:
            return None
        return f"drift {health.drift:.3g} of the site's output is over its limit {self.limit:g}"


@dataclass(frozen=True)
class GradNormGuard:
    """The seed's gradient must be finite and of a norm below `limit`."""

    limit: float = 1e3

    def __call__(self, health: Health) -> str | None:
        g = health.grad_norm
        if g is None or (math.isfinite(g) and g <= self.limit):
            return None
        return f"gradient norm {g:.3g} of the seed is over its limit {self.limit:g}"


DEFAULT_GUARDS: tuple[Guard, ...] = (DriftGuard(), GradNormGuard())
