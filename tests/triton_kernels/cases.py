"""The Triton kernels against float64, on the CPU (interpreted) or on a GPU.

The oracle: outputs and gradients are no worse than twice what torch's own operators make of the
same inputs in the same type (the largest error of a tensor).
`python -m tests.triton_kernels.cases cpu` prints what it ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from esper.triton_kernels.blend import blend
from esper.triton_kernels.gated_mlp import gated_mlp
from esper.triton_kernels.low_rank import low_rank

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Function = Callable[..., Tensor]


def eager_gated_mlp(x: Tensor, wg: Tensor, bg: Tensor | None, wu: Tensor, bu: Tensor | None,
                    wd: Tensor, bd: Tensor | None) -> Tensor:
    return linear(silu(linear(x, wg, bg)) * linear(x, wu, bu), wd, bd)


def eager_low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(linear(x, down), up, bias)


def _run(function: Function, inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """Output, then the gradient of every tensor among the inputs."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def check(ours: Function, eager: Function, inputs: Sequence[Tensor | None], grad: Tensor) -> None:
    exact = _run(eager, [None if t is None else t.double() for t in inputs], grad.double())
    peers = _run(eager, inputs, grad)
    for got, peer, want in zip(_run(ours, inputs, grad), peers, exact, strict=True):
        assert got.dtype == peer.dtype and got.shape == want.shape
        if not want.numel():
            continue
        allowed = 2 * (peer.double() - want).abs().max()
        # Where the peer was just lucky: half a unit for each of the roundings on the way.
        rounding = 2 * torch.finfo(got.dtype).eps * want.abs().max()
        error = (got.double() - want).abs().max()
        assert error <= allowed + rounding, f"{error} > {allowed} + {rounding}"


def blends(device: str) -> Iterator[str]:
    for dtype in (*DTYPES, torch.float64):
        for shape in ((1,), (7, 3), (1024,), (5, 1025), (0, 3)):
            for alpha in (0.3, 0.9375):
                h, s, grad = (torch.randn(shape).to(dtype).to(device) for _ in range(3))
                check(lambda a, b, w=alpha: blend(a, b, w),
                      lambda a, b, w=alpha: torch.lerp(a, b, w), (h, s), grad)
            yield f"blend {dtype} {shape}"
    h, s = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    torch.testing.assert_close(blend(h.T, s.T, 0.5), torch.lerp(h.T, s.T, 0.5))
    assert blend(h, s, 0.0) is h and blend(h, s, 1.0) is s
    x, y = (torch.randn(3, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda a, b: blend(a, b, 0.3).square(), (x, y))
    yield "blend strided, at its ends, twice differentiated"


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def gated_mlps(device: str) -> Iterator[str]:
    # (leading axes, C, H, C'): one tile, none full, several, and odd throughout.
    for lead, channels, width, out in (
        ((1,), 40, 50, 40), ((31,), 1, 1, 1), ((7,), 3, 5, 3), ((64,), 64, 64, 32),
        ((2, 65), 33, 130, 31), ((0,), 4, 4, 4), ((), 40, 7, 50),
    ):
        for dtype in DTYPES:
            for biased in (True, False):
                raw = [torch.randn(*lead, channels)]
                for rows, columns in ((width, channels), (width, channels), (out, width)):
                    raw += [_weight(rows, columns), torch.randn(rows)]
                inputs: list[Tensor | None] = [t.to(dtype).to(device) for t in raw]
                if not biased:
                    inputs[2] = inputs[4] = inputs[6] = None
                grad = torch.randn(*lead, out).to(dtype).to(device)
                check(gated_mlp, eager_gated_mlp, inputs, grad)
            yield f"gated_mlp {dtype} {lead} {channels} {width} {out}"
    x = torch.randn(6, 9, device=device).T  # strided, as are the weights
    weights = [torch.randn(6, 8, device=device).T, torch.randn(6, 8, device=device).T]
    down = torch.randn(8, 6, device=device).T
    check(lambda a, g, u, d: gated_mlp(a, g, None, u, None, d, None),
          lambda a, g, u, d: eager_gated_mlp(a, g, None, u, None, d, None),
          [x, *weights, down], torch.randn(6, 9, device=device).T)
    yield "gated_mlp strided"


def low_ranks(device: str) -> Iterator[str]:
    for lead, channels, rank, out in (
        ((1,), 40, 3, 50), ((31,), 1, 1, 1), ((7,), 3, 2, 5), ((64,), 64, 16, 64),
        ((2, 65), 33, 17, 130), ((0,), 4, 1, 4), ((), 40, 2, 50),
        ((3,), 8, 129, 8),  # above the largest rank that is fused
    ):
        for dtype in DTYPES:
            for biased in (True, False):
                raw = [torch.randn(*lead, channels), _weight(rank, channels), _weight(out, rank),
                       torch.randn(out)]
                inputs: list[Tensor | None] = [t.to(dtype).to(device) for t in raw]
                if not biased:
                    inputs[3] = None
                grad = torch.randn(*lead, out).to(dtype).to(device)
                check(low_rank, eager_low_rank, inputs, grad)
            yield f"low_rank {dtype} {lead} {channels} {rank} {out}"
    x, down = torch.randn(6, 9, device=device).T, torch.randn(6, 3, device=device).T
    up = torch.randn(3, 7, device=device).T
    check(low_rank, eager_low_rank, [x, down, up], torch.randn(7, 9, device=device).T)
    frozen = torch.randn(4, 6, device=device)
    down = down.detach().requires_grad_()  # x needs no gradient
    low_rank(frozen, down, up).sum().backward()
    torch.testing.assert_close(
        down.grad, torch.autograd.grad(eager_low_rank(frozen, down, up).sum(), down)[0])
    yield "low_rank strided, frozen input"


ALL = {"blend": blends, "gated_mlp": gated_mlps, "low_rank": low_ranks}


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[2:] or ALL:
        for line in ALL[name](sys.argv[1]):
            print(line, flush=True)
