"""How wrong a kernel may be: no more than twice as wrong as eager torch.

The truth is the blueprint's reference in float64. Eager is the same reference in the
kernel's own dtype, so its distance from the truth is what that dtype costs on this very
input. A kernel may sum in another order, hence the factor of two; a hand-picked tolerance
would be too tight for one blueprint and too loose for the next. (The oracle is that of
flash-attention's tests.)

An error is max |x - truth| over a tensor, divided by max |truth|. A kernel passes with

    error <= 2 * eager's error + floor

where the floor is `FLOOR_ULPS` units in the last place of that scale, because eager can be
exact by luck. A parameter's gradient is a sum over n positions. Eager sums pairwise, a
compiled loop one by one, which is a random walk of n roundings: in full precision such a
gradient's floor is raised by sqrt(n) / 4 units, with n at most `CHUNK`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR, Op
from esper.leyline.mode import FULL, TRAINING
from esper.leyline.reference import apply, function, isolated
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteSignature

MAX_RATIO = 2.0
# In half precision eager rounds after every operation, so it is never exact by luck for long.
# A float64 kernel is compared with a truth as imprecise as itself, so only errors clearly
# above rounding count there.
FLOOR_ULPS = {torch.float64: 256.0, torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# Longer sums are split into chunks by every compiler that cares for precision.
CHUNK = 4096


@dataclass(frozen=True)
class Problem:
    """One call of a kernel: its inputs and the gradient that comes back."""

    h: Tensor
    params: tuple[Tensor, ...]
    grad_out: Tensor
    alpha: float
    mode: int

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            h=self.h.to(dtype),
            params=tuple(p.to(dtype) for p in self.params),
            grad_out=self.grad_out.to(dtype),
        )


def reference_kernel(ir: BlueprintIR, signature: SiteSignature) -> Kernel:
    """The meaning of `ir` as a kernel, in eager torch, in the dtype of its inputs.

    Written as one would by hand, for kernels are timed against it as well: nothing is blended
    at the ends, and what is blended is one `lerp`.
    """
    seed = function(ir, signature)

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if mode == TRAINING:
            s = seed(h.detach(), params)
            return isolated(h, s)
        if alpha == 0.0:
            return h
        s = seed(h if mode == FULL else h.detach(), params)
        return s if alpha == 1.0 else torch.lerp(h, s, alpha)

    return kernel


def run(kernel: Kernel, problem: Problem) -> list[Tensor]:
    """Forward and backward once: [out, gradient of h, gradients of the parameters].

    Raises:
        RuntimeError: the kernel does, or its output has no graph.
    """
    # detach() keeps strides and storage, so that layout cases stay what they are.
    h = problem.h.detach().requires_grad_(True)
    params = [p.detach().requires_grad_(True) for p in problem.params]
    with torch.enable_grad():
        out = kernel(h, params, problem.alpha, problem.mode)
    # At alpha 1 a kernel may well leave h out of the graph; that is a gradient of zero.
    grads = torch.autograd.grad(out, [h, *params], problem.grad_out, materialize_grads=True)
    return [out.detach(), *grads]


class Kinks(TorchFunctionMode):
    """Notes how near the inputs of relu come to zero, relative to their scale.

    There the gradient jumps: one input, rounded to the other side of zero, changes a gradient
    by a whole term, in a kernel as in eager, and says nothing about either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nearest = float("inf")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.nn.functional.relu, torch.relu):
            x = args[0].detach().abs()
            self.nearest = min(self.nearest, float(x.min() / x.max().clamp_min(1e-300)))
        return func(*args, **(kwargs or {}))


def nearest_kink(ir: BlueprintIR, signature: SiteSignature, problem: Problem) -> float:
    """Distance of the nearest relu input from zero over the largest one, in float64."""
    if not any(node.op is Op.RELU for node in ir.nodes):
        return float("inf")
    exact = problem.to(torch.float64)
    with torch.no_grad(), Kinks() as kinks:
        apply(ir, signature, exact.h, exact.params)
    return float(kinks.nearest)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, eager's other way of computing it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@dataclass
class Deviation:
    """The largest error of kernel and eager seen so far in one tensor."""

    name: str
    floor: float
    kernel: float = 0.0
    eager: float = 0.0

    @property
    def ratio(self) -> float:
        """At most `MAX_RATIO` where the kernel passes."""
        return self.kernel / (self.eager + self.floor / MAX_RATIO)

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.kernel:.3g}, eager's own {self.eager:.3g} "
            f"(of its largest element, floor {self.floor:.3g}): {self.ratio:.3g} times that"
        )


class Oracle:
    """Compares a kernel with the truth on problems of one kind and keeps the worst.

    Problems of several random seeds are pooled before the ratio is taken: a maximum over few
    elements is a noisy figure, and one seed of luck on eager's side must not refuse a kernel.
    """

    def __init__(self, ir: BlueprintIR, signature: SiteSignature) -> None:
        self._reference = reference_kernel(ir, signature)
        self._attention = any(node.op is Op.ATTENTION for node in ir.nodes)
        self._channels = signature.channels
        self._dtype: torch.dtype = getattr(torch, signature.dtype)
        floor = FLOOR_ULPS[self._dtype] * torch.finfo(self._dtype).eps
        self._parameters = infer(ir, signature).parameters
        names = ["output", "gradient of h"]
        names += [f"gradient of {p.name}" for p in self._parameters]
        self.deviations = [Deviation(name, floor) for name in names]

    def add(self, kernel_results: Sequence[Tensor], problem: Problem) -> None:
        """Take in what the kernel gave for `problem`."""
        truth = run(self._reference, problem.to(torch.float64))
        eager = [run(self._reference, problem)]
        if self._attention:
            with _plain_attention():
                eager.append(run(self._reference, problem))
        scales = self._scales(truth, problem)
        self._raise_floors(problem.h.numel() // self._channels)
        for i, deviation in enumerate(self.deviations):
            # Where eager overflows the dtype is at its end; elsewhere the kernel must be finite.
            sane = torch.stack([e[i].isfinite() for e in eager]).all(0) & truth[i].isfinite()
            own = max(_error(e[i], truth[i], scales[i], sane) for e in eager)
            found = _error(kernel_results[i], truth[i], scales[i], sane)
            deviation.eager = max(deviation.eager, own)
            deviation.kernel = max(deviation.kernel, found)

    def _raise_floors(self, positions: int) -> None:
        if self._dtype is torch.float32:  # half precision sums in float32, float64 has room
            ulps = FLOOR_ULPS[self._dtype] + min(positions, CHUNK) ** 0.5 / 4
            for deviation in self.deviations[2:]:
                deviation.floor = ulps * torch.finfo(self._dtype).eps

    def _scales(self, truth: Sequence[Tensor], problem: Problem) -> list[float]:
        """The largest element of each tensor; for biases, at least that of their weight.

        The gradient of a bias in front of a normalisation, or of attention's keys, is zero in
        truth, as the sum of terms that cancel. What is left of it in floating point is the
        rounding of those terms, which are as large as the weight's gradient over the input.
        """
        scales = [_largest(t) for t in truth]
        inputs = max(1.0, _largest(problem.h))
        weights: dict[str, float] = {}
        for i, p in enumerate(self._parameters, start=2):
            if p.name.endswith(".weight"):
                weights[p.node] = scales[i]
            else:
                scales[i] = max(scales[i], weights.get(p.node, 0.0) / inputs)
        return scales

    @property
    def refusal(self) -> str:
        """What is too wrong, the output before any gradient; "" where nothing is."""
        for deviation in self.deviations:
            if deviation.ratio > MAX_RATIO:
                return f"{deviation}, at most {MAX_RATIO:g} are allowed"
        return ""

    @property
    def worst(self) -> Deviation:
        return max(self.deviations, key=lambda d: d.ratio)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _error(x: Tensor, truth: Tensor, scale: float, sane: Tensor) -> float:
    if not sane.any():
        return 0.0
    difference = (x.double() - truth).abs()[sane]
    largest = float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
    if largest == 0:
        return 0.0
    return largest / scale if scale else float("inf")
