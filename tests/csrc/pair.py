"""A small compiled pair, written by hand so that what it must compute is plain to see.

seed(h) = tanh(h W1' + b1) W2' + b2, blended into h. The backward's outputs are in a jumbled
order on purpose: `GRADIENTS` has to be used to tell which is which. `PairLoader` serves it to
a growth as if it came from the library.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.loader import Ready
from esper.kasmina.native import open_kernel
from esper.leyline.blueprint import BlueprintIR, C, Node, Op, Width
from esper.leyline.signature import SiteKind, SiteSignature

CHANNELS, HIDDEN = 24, 10
BACKWARD_INPUTS = ["in:1", "in:0", "grad", "in:2", "out:1", "in:4"]
GRADIENTS = [2, 3, 4, 1, 0]  # h, w1, b1, w2, b2


class Forward(nn.Module):
    def forward(
        self, h: Tensor, alpha: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = torch.tanh(nn.functional.linear(h, w1, b1))
        s = nn.functional.linear(z, w2, b2)
        return h + alpha * (s - h), z


class Backward(nn.Module):
    def forward(
        self, alpha: Tensor, h: Tensor, grad: Tensor, w1: Tensor, z: Tensor, w2: Tensor
    ) -> tuple[Tensor, ...]:
        g_s = alpha * grad
        g_a = (g_s @ w2) * (1 - z * z)
        g_h = (1 - alpha) * grad + g_a @ w1
        return g_s.sum(0), g_s.T @ z, g_h, g_a.T @ h, g_a.sum(0)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    shapes = [(HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,)]
    return [
        (torch.randn(shape, dtype=torch.float64) * 0.3).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


@lru_cache(maxsize=4)
def compile_pair(
    device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Paths of forward.so and backward.so; batch is dynamic. Takes some ten seconds, once."""
    import torch._inductor

    folder = Path(mkdtemp(prefix="esper-pair-"))
    batch = torch.export.Dim("batch", min=1, max=4096)
    w1, b1, w2, b2 = (p.detach() for p in parameters(dtype, device))
    h = torch.randn(8, CHANNELS, device=device, dtype=dtype)
    alpha = torch.tensor(0.5, device=device)
    z = torch.randn(8, HIDDEN, device=device, dtype=dtype)
    halves = {
        "forward": (Forward(), (h, alpha, w1, b1, w2, b2), {0}),
        "backward": (Backward(), (alpha, h, h.clone(), w1, z, w2), {1, 2, 4}),
    }
    paths = []
    for name, (module, args, batched) in halves.items():
        shapes = tuple({0: batch} if i in batched else None for i in range(len(args)))
        graph = torch.export.export(module, args, dynamic_shapes=shapes).module()
        target = str(folder / f"{name}.so")
        options = {"aot_inductor.output_path": target}
        assert torch._inductor.aot_compile(graph, args, options=options) == target
        paths.append(target)
    return paths[0], paths[1]


BLUEPRINT = BlueprintIR(
    kind=SiteKind.FEATURES,
    nodes=(
        Node(id="up", op=Op.LINEAR, inputs=("h",), out=Width(times=5, over=12)),  # 10 of 24
        Node(id="act", op=Op.TANH, inputs=("up",)),
        Node(id="down", op=Op.LINEAR, inputs=("act",), out=C),
    ),
    output="down",
)


class PairLoader:
    """A loader of this pair's kernel, ready at once, with other parameters for each seed."""

    def __init__(self) -> None:
        self._kernel = open_kernel(*compile_pair(), BACKWARD_INPUTS, GRADIENTS, "cpu")

    def prefetch(self, kernel_id: str, signature: SiteSignature, seed: int) -> Future[Any]:
        from tests.support import opened

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            values = [p.detach() for p in parameters()]
        future: Future[Any] = Future()
        future.set_result(Ready(opened(BLUEPRINT, signature, self._kernel), values))
        return future

    def close(self) -> None:
        pass
