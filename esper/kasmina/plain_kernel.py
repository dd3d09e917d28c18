"""`SeedKernel` without the extension: the same contract by way of torch.autograd.Function.

Slower per call (each node is made by Python), equal in every result; one contract suite runs
over both (tests/kasmina/test_native.py). Inductor is not imported: torch's own runner is used.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from esper.leyline.mode import FULL, GRAFTING, TRAINING

_CONVENTION = (
    'an input of the backward is "in:I" (forward input), "out:K" (forward output) or "grad"; '
    "compile the kernel again with the compiler of this version"
)
SECOND_DERIVATIVE = (
    "a second derivative was asked for (create_graph=True) through a compiled seed; its "
    "backward is compiled too and has no derivative. Leave create_graph off, or cull the seed "
    "first"
)

_TRANSFORMED = (
    "a compiled kernel was called under a transform (torch.func, forward-mode derivatives, "
    "torch.jit.trace, make_fx) or with a tensor that is fake or of a subclass; its code would "
    "compute past that. Call it outside of the transform, or transform what esper.export(model) "
    "returns"
)

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class CallerError(ValueError):
    """The call is wrong, whatever the kernel is. It is never held against the kernel."""


def _check_untransformed(tensors: Sequence[Tensor]) -> None:
    """What csrc/plain.h has under the same name.

    Raises:
        CallerError: what is computed from these is to be recorded or transformed by other means
            than autograd's backward.
    """
    c: Any = torch._C
    kinds, modes = c.DispatchKey, c._TorchDispatchModeKey
    keys = (kinds.Python, kinds.Functionalize, kinds.FuncTorchBatched,
            kinds.FuncTorchGradWrapper)
    if (
        c._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or any(c._get_dispatch_mode(m) for m in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL))
        or any(c._dispatch_keys(t).has(key) for t in tensors for key in keys)
        or (forward_ad._current_level >= 0
            and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors))
    ):
        raise CallerError(_TRANSFORMED)


def _materialized(tensor: Tensor) -> Tensor:
    """The same values in memory as compiled code reads it: in plain order, negated where so."""
    if tensor.is_neg() or tensor._is_zerotensor():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


class _Alphas:
    """0-dim tensors of alpha. One handed out is never written to: autograd may have saved it.

    What is made while a stream is captured lies in that graph's memory, and is the graph's alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[bool, tuple[float, Tensor, object]] = {}

    def get(self, alpha: float, device: torch.device) -> Tensor:
        one = alpha == 1.0  # TRAINING's value has its own place beside the schedule's
        # Used on the stream that filled it only; another one would not wait for that.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None and torch.cuda.is_current_stream_capturing():
            return _alpha(alpha, device)
        with self._lock:
            held = self._made.get(one)
            if held is None or (held[0], held[1].device, held[2]) != (alpha, device, stream):
                held = alpha, _alpha(alpha, device), stream
                self._made[one] = held
            return held[1]


def _alpha(alpha: float, device: torch.device) -> Tensor:
    # Made under inference_mode it could not be saved, and it outlives the call.
    with torch.inference_mode(False):
        return torch.full((), alpha, dtype=torch.float32, device=device)


def _parse(text: str, forward_inputs: int) -> tuple[str, int]:
    if text == "grad":
        return "grad", 0
    match = re.fullmatch(r"(in|out):([0-9]+)", text)
    if match is None:
        raise ValueError(f"cannot read {text}: {_CONVENTION}")
    if match[1] == "in" and int(match[2]) >= forward_inputs:
        raise ValueError(
            f"the backward asks for {text}, the forward has {forward_inputs} inputs; {_CONVENTION}"
        )
    return match[1], int(match[2])


def _runner(path: str, device: str) -> Any:
    kind = torch.device(device).type
    runners: Any = torch._C._aoti
    if kind == "cpu":
        return runners.AOTIModelContainerRunnerCpu(path, 1)
    if kind == "cuda" and hasattr(runners, "AOTIModelContainerRunnerCuda"):
        # The last one: where it looks for cubins that are not embedded.
        return runners.AOTIModelContainerRunnerCuda(path, 1, device, os.path.dirname(path))
    raise ValueError(
        f"a kernel was asked for on device {device}, but this torch runs kernels on cpu"
        f"{' and cuda' if hasattr(runners, 'AOTIModelContainerRunnerCuda') else ' only'}; "
        "choose one of them, or install a torch built for the device"
    )


class SeedKernel:
    """A forward and a backward compiled ahead of time; arguments as in `native.open_kernel`."""

    def __init__(
        self,
        forward_so: str,
        backward_so: str,
        backward_inputs: list[str],
        gradients: list[int],
        device: str = "cpu",
        dtype: str = "float32",
        shapes: Sequence[Sequence[int]] = (),
    ) -> None:
        if not gradients:
            raise ValueError(
                "gradients is empty; it has one entry for h and one for each parameter"
            )
        if min(gradients) < -1:
            raise ValueError(
                f"gradients holds {min(gradients)}; an entry is an index of a backward output, "
                "or -1 for none"
            )
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype is {dtype}; it must be float32, float64, bfloat16 or float16"
            )
        if shapes and len(shapes) != len(gradients):
            raise ValueError(
                f"shapes has {len(shapes)} entries; it has one for h and one for each parameter, "
                f"{len(gradients)} in all"
            )
        self.gradients, self._shapes = tuple(gradients), shapes
        self.sources = [_parse(text, len(gradients) + 1) for text in backward_inputs]
        self.alphas = _Alphas()
        self._device = torch.device(device)
        if self._device == torch.device("cuda"):  # the current one, as everywhere in torch
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._dtype = _DTYPES[dtype]
        self._outputs = 1 + max((i for kind, i in self.sources if kind == "out"), default=0)
        self._forward = _runner(forward_so, device)
        self._backward = _runner(backward_so, device)

    def __call__(
        self,
        h: Tensor,
        params: list[Tensor],
        alpha: float,
        mode: int,
        failed: Callable[[str], None] | None = None,
    ) -> Tensor:
        """With `failed`, a backward that raises is told there, and the gradient goes on to h as it
        came; without, it raises on. What autograd has against a backward raises in either case."""
        if h.dtype != self._dtype and torch.is_autocast_enabled(h.device.type):
            # Under autocast a site's element type is whatever the layer before it was cast to.
            inside = h.to(self._dtype)
            result = self(inside, params, alpha, mode, failed)
            return h if result is inside else result.to(h.dtype)
        self._check(h, params, alpha, mode)
        if mode != TRAINING and alpha == 0.0:
            return h
        grad = torch.is_grad_enabled()
        learns = grad and any(p.requires_grad for p in params)
        if mode == TRAINING and not learns:
            return h
        if not learns and not (grad and h.requires_grad):
            with torch.no_grad():
                return self.run_forward(self.inputs(h, params, alpha, mode))[0]
        out: Tensor = _SeedFunction.apply(self, alpha, mode, failed, h, *params)
        return out

    def inputs(
        self, h: Tensor, params: list[Tensor], alpha: float, mode: int
    ) -> list[Tensor]:
        """The forward's inputs; contiguous, for that is what it was compiled for.

        In TRAINING the caller gets h itself back, and what it does to it next (an in-place
        activation, say) must not reach what was saved here.
        """
        if mode == TRAINING:
            h = h.detach().clone(memory_format=torch.contiguous_format)
        alpha_tensor = self.alphas.get(1.0 if mode == TRAINING else alpha, h.device)
        return [_materialized(h), alpha_tensor, *(_materialized(p) for p in params)]

    def run_forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._run(self._forward, inputs, self._outputs, "forward")

    def run_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._run(self._backward, inputs, 1 + max(self.gradients), "backward")

    def _run(self, runner: Any, inputs: list[Tensor], wanted: int, half: str) -> list[Tensor]:
        # An autocast around the step must not reach the operators that compiled code calls.
        with torch.autocast(self._device.type, enabled=False):
            outputs: list[Tensor] = runner.run(inputs)
        if len(outputs) < wanted:
            raise RuntimeError(
                f"the kernel's {half} returned {len(outputs)} tensors, its manifest needs at "
                f"least {wanted}; manifest and code do not belong together: compile the kernel "
                "again"
            )
        return outputs

    def _check(self, h: Tensor, params: list[Tensor], alpha: float, mode: int) -> None:
        if mode not in (TRAINING, GRAFTING, FULL):
            raise ValueError(
                f"mode is {mode}; it must be 0 (TRAINING), 1 (GRAFTING) or 2 (FULL)"
            )
        _check_untransformed([h, *params])
        # Compiled code does not look at what it is given, so a mistake is caught here or never.
        if len(params) + 1 != len(self.gradients):
            raise ValueError(
                f"the kernel has {len(self.gradients) - 1} parameters, {len(params)} were given; "
                "pass the parameters made from its manifest, in that order"
            )
        if h.device != self._device:
            raise CallerError(
                f"the kernel runs on {self._device}, h is on {h.device}; move the model back, or "
                "let it grow there"
            )
        for p in params:
            if p.device != h.device or p.dtype != h.dtype:
                raise ValueError(
                    f"h is {h.dtype} on {h.device}, a parameter is {p.dtype} on {p.device}; move "
                    "the seed with its host, and call it outside of autocast"
                )
        # Agreement with the parameters is not enough: a model that is converted as a whole takes
        # its seeds' parameters along, and float32 code would read beyond the end of a half h.
        if h.dtype != self._dtype:
            raise ValueError(
                f"the kernel is compiled for {self._dtype}, h is {h.dtype}; choose a kernel for "
                "that type, or convert the model before it grows"
            )
        # Nor does it check sizes: others would be read beyond their end.
        for what, given, shape in zip(
            ("h", *("a parameter" for _ in params)), (h, *params), self._shapes, strict=False
        ):
            if len(given.shape) != len(shape) or any(
                wanted not in (-1, size) for size, wanted in zip(given.shape, shape, strict=True)
            ):
                raise ValueError(
                    f"{what} is of {list(given.shape)}, the kernel is compiled for {list(shape)} "
                    "(-1: any); choose a kernel for that site"
                )
        if mode != TRAINING and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must be within 0 and 1")


class _SeedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: SeedKernel,
        alpha: float,
        mode: int,
        failed: Callable[[str], None] | None,
        h: Tensor,
        *params: Tensor,
    ) -> Tensor:
        inputs = kernel.inputs(h, list(params), alpha, mode)
        outputs = kernel.run_forward(inputs)
        pools = {"in": inputs, "out": outputs}
        ctx.save_for_backward(*(pools[kind][i] for kind, i in kernel.sources if kind != "grad"))
        ctx.call = kernel, alpha, mode, failed
        # An input that is returned unchanged comes out as an alias with this node behind it.
        return h if mode == TRAINING else outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        kernel, alpha, mode, failed = ctx.call
        needs, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        try:
            result = _gradients(kernel, alpha, mode, grad, saved, needs)
        except Exception as e:
            if failed is None:
                raise
            failed(f"backward: {e}")
            result = [grad if needs[0] else None, *(None for _ in needs[1:])]
        return None, None, None, None, *result


def _gradients(
    kernel: SeedKernel, alpha: float, mode: int, grad: Tensor, saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of h and of each parameter, None where not needed."""
    result: list[Tensor | None] = [None] * len(needs)
    first = 0 if mode == FULL else 1
    if any(needs[first:]):
        next_saved = iter(saved)
        outputs = kernel.run_backward(
            [_materialized(grad) if kind == "grad" else next(next_saved)
             for kind, _ in kernel.sources]
        )
        for i, pick in enumerate(kernel.gradients):
            if i >= first and pick >= 0 and needs[i]:
                result[i] = outputs[pick]
    if needs[0] and mode == TRAINING:
        result[0] = grad
    elif needs[0] and mode == GRAFTING:
        result[0] = torch.zeros_like(grad) if alpha == 1.0 else grad * (1.0 - alpha)
    return result
