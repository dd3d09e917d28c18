"""What a loop that has more than torch's optimizer tells of its steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class StepWatch:
    """torch's optimizer behind what Accelerate made of it, and whether it was stepped.

    A GradScaler leaves a step out where a gradient is not finite; Accelerate's optimizer does
    nothing amid an accumulation. A fused optimizer is called all the same, and skips by itself.
    Without either, whoever asks is believed to have taken a step.

    `scaler` is what was given, or what Accelerate's optimizer has.
    """

    def __init__(self, optimizer: Any, scaler: Any = None) -> None:
        self.optimizer = optimizer
        while isinstance(inner := getattr(self.optimizer, "optimizer", None), Optimizer):
            self.optimizer = inner
        self.scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        self._stepped = False
        self._found_inf: Any = None
        self._handle: Any = None
        if self.scaler is not None or self.optimizer is not optimizer:
            self._handle = self.optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        self._found_inf = getattr(optimizer, "found_inf", None)

    def stepped(self) -> bool:
        """Since it was last asked. Waits for the device where a scaler drives a fused optimizer."""
        if self._handle is None:
            return True
        stepped, self._stepped = self._stepped, False
        return stepped and (self._found_inf is None or not bool(self._found_inf))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
