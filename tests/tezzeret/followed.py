"""Launch plans, followed by the extension as on a GPU, with Triton's interpreter in its place.

Everything is the real thing but the last step: `esper._C` allocates the buffers, computes grids and
numbers and packs the arguments, inside the autograd node that trains; each launch, addresses and
all, is then run by Triton's interpreter on the CPU.

The oracle: outputs and gradients are no worse than twice what eager torch makes of the same inputs
in the same type (the largest error of a tensor), against float64.
`python -m tests.tezzeret.followed` prints what it ran; TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.kasmina import native
from esper.kasmina.launches import as_tuples
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.launch import CubinKernel, Plan
from esper.leyline.reference import apply, blend, initial_parameters
from esper.leyline.shapes import infer
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.tezzeret.cubins import function_of
from esper.tezzeret.programs import Form, Program, program
from tests.tezzeret.templates import gated, low_rank

TRAINING, GRAFTING, FULL = 0, 1, 2
HIDDEN = 2  # addresses of Triton's own that follow the arguments
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Address:
    """A bare address, as much of a tensor as Triton's interpreter asks for."""

    def __init__(self, address: int, type_: str) -> None:
        self._address, self.dtype = address, DTYPES[type_.removeprefix("*")]

    def data_ptr(self) -> int:
        return self._address

    def untyped_storage(self) -> Address:
        return self

    def new_empty(self, *_: object, **__: object) -> Address:
        return Address(self._address, next(t for t, d in DTYPES.items() if d is self.dtype))

    def cpu(self) -> Address:
        return self

    def nothing(self, *_: object) -> None: ...

    set_ = copy_ = storage_offset = size = stride = nothing


class Device:
    """Runs launches by Triton's interpreter; notes which."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self._forms, self.launched = forms, list[str]()

    def __call__(self, kernel: int, grid: Sequence[int], values: Sequence[int]) -> None:
        form = self._forms[kernel]
        self.launched.append(form.function)
        assert len(values) == len(form.types) + HIDDEN and not any(values[-HIDDEN:])
        given: list[Any] = []
        for type_, aligned, value in zip(form.types, form.aligned, values, strict=False):
            assert not aligned or value % 16 == 0, f"{form.function}: {value} is not aligned"
            given.append(Address(value, type_) if type_.startswith("*") else value)
        constants = dict(form.constants)
        if "PRECISION" in constants and "*fp32" not in form.types:
            constants["PRECISION"] = "widened"  # see add_product
        function_of(form)[tuple(grid)](*given, **constants)


def plan_of(what: Program) -> Plan:
    """A plan whose kernels have no code; what they would take of a GPU is made up."""
    kernels = tuple(
        CubinKernel(name=f.function.partition(".")[2], offset=i, bytes=1, parameters=f.types,
                    hidden=HIDDEN, warps=f.warps, shared=0, registers=1, stack=0)  # type: ignore[arg-type]
        for i, f in enumerate(what.forms)
    )
    return Plan(arch="sm_80", kernels=kernels, forward=what.forward, backward=what.backward)


def kernel_of(ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline) -> tuple[Any, Device]:
    extension = native.extension()
    assert extension is not None, "the extension is not built"
    what = program(ir, signature, pipeline)
    device = Device(what.forms)
    shapes = [list(signature.shape(-1, -1)),
              *(list(p.shape) for p in infer(ir, signature).parameters)]
    return extension.SeedKernel.followed(
        as_tuples(plan_of(what)), device, list(what.backward_inputs), list(what.gradients), "cpu",
        signature.dtype.value, shapes), device


def expected(
    ir: BlueprintIR, signature: SiteSignature, h: Tensor, params: Sequence[Tensor], alpha: float,
    mode: int, grad: Tensor,
) -> list[Tensor]:
    """Output and gradients by eager autograd, in the type of h, from the meaning of each mode."""
    host = h.detach().requires_grad_()
    leaves = [p.detach().requires_grad_() for p in params]
    seed = apply(ir, signature, host if mode == FULL else host.detach(), leaves)
    if mode == TRAINING:
        return [host.detach(), grad, *torch.autograd.grad(seed, leaves, grad)]
    out = blend(host, seed, torch.tensor(alpha, device=h.device))
    return [out.detach(), *torch.autograd.grad(out, [host, *leaves], grad, allow_unused=True)]


def check(
    kernel: Any, ir: BlueprintIR, signature: SiteSignature, h: Tensor, params: Sequence[Tensor],
    alpha: float, mode: int,
) -> None:
    grad = torch.randn(h.shape).to(h.device, h.dtype)
    host = h.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [p.detach().clone().requires_grad_() for p in params]
    out = kernel(host * 1, leaves, alpha, mode)
    found = [out.detach(), *torch.autograd.grad(out, [host, *leaves], grad)]
    peers = expected(ir, signature, h, params, alpha, mode, grad)
    exact = expected(ir, signature, h.double(), [p.double() for p in params], alpha, mode,
                     grad.double())
    for index, (got, peer, want) in enumerate(zip(found, peers, exact, strict=True)):
        assert got.dtype == h.dtype and got.shape == want.shape, index
        if not want.numel():
            continue
        allowed = 2 * (peer.double() - want).abs().max()
        # Where the peer was just lucky: one unit for each of the roundings on the way, which the
        # interpreter makes towards zero in bfloat16. The output is a sum, which may be far smaller
        # than what is added.
        scale = max(want.abs().max(), host.detach().abs().max() if index == 0 else 0)
        rounding = 8 * torch.finfo(got.dtype).eps * scale
        error = (got.double() - want).abs().max()
        assert error <= allowed + rounding, f"tensor {index}: {error} > {allowed} + {rounding}"


def signature_of(lead: Sequence[int], channels: int, dtype: DType) -> SiteSignature:
    kind = SiteKind.FEATURES if len(lead) == 1 else SiteKind.TOKENS
    return SiteSignature(kind=kind, channels=channels, dtype=dtype, device="cuda")


def cases() -> Iterator[str]:
    # (leading extents of h, C): one row, fewer than a tile, none full, several tiles, none at all.
    sizes = (((1,), 8), ((7,), 1), ((3, 11), 24), ((70,), 65), ((0,), 16))
    blueprints = (
        lambda kind: low_rank(kind, rank=3, bias=True), lambda kind: low_rank(kind, rank=17),
        lambda kind: gated(kind), lambda kind: gated(kind, norm=False, bias=True, width=19),
    )
    for number, make in enumerate(blueprints):
        for place, (lead, channels) in enumerate(sizes):
            dtype = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)[(number + place) % 3]
            pipeline = tuple(Pipeline)[place % 3]
            signature = signature_of(lead, channels, dtype)
            ir = make(signature.kind)
            kernel, device = kernel_of(ir, signature, pipeline)
            torch_type = getattr(torch, dtype)
            params = [p + 0.3 * torch.randn(p.shape).to(torch_type)
                      for p in initial_parameters(ir, signature)]
            h = torch.randn(*lead, channels).to(torch_type)
            for alpha, mode in ((1.0, TRAINING), (0.3, GRAFTING), (1.0, GRAFTING), (0.3, FULL),
                                (1.0, FULL)):
                check(kernel, ir, signature, h, params, alpha, mode)
            assert kernel(h, params, 0.0, FULL) is h
            yield f"{ir.name} {lead} {channels} {dtype} {pipeline}: {len(device.launched)}"
    yield from corners()


def corners() -> Iterator[str]:
    signature = signature_of((5,), 12, DType.FLOAT32)
    ir = gated(signature.kind)
    kernel, _ = kernel_of(ir, signature, Pipeline.FAST)
    params = [p + 0.3 * torch.randn(p.shape) for p in initial_parameters(ir, signature)]
    strided, odd = torch.randn(12, 5).T, torch.randn(61)[1:].reshape(5, 12)
    assert odd.data_ptr() % 16 != 0
    for h in (strided, odd):
        check(kernel, ir, signature, h, params, 0.7, FULL)
    yield "an input with gaps, and one at an odd address"
    # The halves themselves, at alpha = 0, which the node never asks them for.
    poisoned = [torch.full_like(p, float("inf")) for p in params]
    h = torch.randn(5, 12)
    what = program(ir, signature, Pipeline.FAST)
    nothing = halves(what, [h, torch.tensor(0.0), *poisoned])[0]
    assert torch.equal(nothing, h), "bit for bit, whatever the seed gives"
    yield "alpha 0 in the forward itself"


def halves(what: Program, inputs: list[Tensor]) -> list[Tensor]:
    """The forward alone, by a second reading of the plan: in Python, with nothing of the
    extension's."""
    half, device = what.forward, Device(what.forms)
    lead = inputs[half.like_h].shape[:-1]
    rows = lead.numel()
    buffers = [torch.empty(*(lead if b.rows else ()), *b.shape, dtype=DTYPES[b.type])
               for b in half.buffers]
    for step in half.launches:
        values = []
        for argument in step.arguments:
            if isinstance(argument, str):
                kind, _, index = argument.partition(":")
                values.append((inputs if kind == "in" else buffers)[int(index)].data_ptr())
            else:
                values.append(argument.at(rows))
        device(step.kernel, [e.at(rows) for e in step.grid], [*values, *[0] * HIDDEN])
    return [buffers[i] for i in half.outputs]


if __name__ == "__main__":
    torch.manual_seed(0)
    for line in cases():
        print(line, flush=True)
    sys.exit(0)
