"""Shared pieces of the tests: small hosts not written for esper, and kernels in plain torch.

`plain_kernel` obeys the contract of a compiled kernel by way of the reference, so that the
lifecycle can be tested without a compiler. What a compiled kernel does is tested with real
ones, in the tests marked slow.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.artifact import OpenedKernel
from esper.kasmina.growth import Growth
from esper.kasmina.loader import Ready
from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Toolchain
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.command import Action, Command
from esper.leyline.reference import apply, blend, initial_parameters
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), ResidualBlock(8), ResidualBlock(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)
    )


class Transformer(nn.Module):
    """A small language model over 32 symbols, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


HOSTS = {
    "cnn": (cnn, lambda b=4: torch.randn(b, 1, 8, 8), ["2", "3"], False),
    "mlp": (mlp, lambda b=4: torch.randn(b, 16), ["1", "3"], False),
    "transformer": (Transformer, lambda b=4: torch.randint(0, 32, (b, 6)), ["layers.*"], True),
}
"""name: (make host, make input, sites, causal)"""


def bottleneck(kind: SiteKind, act: Op = Op.GELU, bias: bool | None = None) -> BlueprintIR:
    return BlueprintIR(
        kind=kind,
        name="bottleneck",
        nodes=(
            Node(id="down", op=Op.LINEAR, inputs=("h",), out=Width(times=1, over=2),
                 bias=bias),
            Node(id="act", op=act, inputs=("down",)),
            Node(id="up", op=Op.LINEAR, inputs=("act",), out=C, init=Init.ZERO, bias=bias),
            Node(id="sum", op=Op.ADD, inputs=("h", "up")),
        ),
        output="sum",
    )


def plain_kernel(ir: BlueprintIR, signature: SiteSignature) -> Any:
    def full(h: Tensor, params: list[Tensor], alpha: float) -> Tensor:
        return blend(h, apply(ir, signature, h, params), torch.tensor(alpha))

    class Isolated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, alpha: float, mode: int, *params: Tensor) -> Tensor:
            ctx.save_for_backward(h, *params)
            ctx.alpha, ctx.mode = alpha, mode
            return h.view_as(h) if mode == 0 else full(h, list(params), alpha)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            (g,) = grads
            h, *params = (t.detach() for t in ctx.saved_tensors)
            with torch.enable_grad():
                leaves = [p.requires_grad_() for p in params]
                out = full(h, leaves, 1.0 if ctx.mode == 0 else ctx.alpha)
                got = torch.autograd.grad(out, leaves, g)
            return (g if ctx.mode == 0 else (1 - ctx.alpha) * g, None, None, *got)

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if h.dtype != params[0].dtype and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return kernel(h.to(params[0].dtype), params, alpha, mode).to(h.dtype)
        if mode != 0 and alpha == 0:
            return h
        return full(h, params, alpha) if mode == 2 else Isolated.apply(h, alpha, mode, *params)

    return kernel


def opened(ir: BlueprintIR, signature: SiteSignature, kernel: Any = None) -> OpenedKernel:
    manifest = Manifest(
        kernel_id="k-test", blueprint_id=ir.id, signature=signature, pipeline=Pipeline.FAST,
        toolchain=Toolchain(torch=torch.__version__, isa="test", compiler="none", esper="test"),
        parameters=tuple(
            ParameterSpec(name=p.name, shape=p.shape) for p in infer(ir, signature).parameters
        ),
        backward_inputs=(), gradients=(), sha256={}, compile_seconds=0, flops=0,
    )
    return OpenedKernel(manifest, ir, kernel or plain_kernel(ir, signature))


class ReadyLoader:
    """A loader whose kernels are there at once; `kernel` replaces the callable."""

    def __init__(
        self, kernel: Any = None, error: Exception | None = None, bias: bool | None = None
    ) -> None:
        self._kernel, self._error, self._bias = kernel, error, bias

    def prefetch(self, kernel_id: str, signature: SiteSignature, seed: int) -> Future[Any]:
        future: Future[Any] = Future()
        if self._error is not None:
            future.set_exception(self._error)
            return future
        ir = bottleneck(signature.kind, bias=self._bias)
        generator = torch.Generator().manual_seed(seed)
        future.set_result(
            Ready(opened(ir, signature, self._kernel),
                  initial_parameters(ir, signature, generator=generator))
        )
        return future

    def close(self) -> None:
        pass


def command(action: Action, site: str) -> Command:
    return Command(action=action, site=site, kernel_id="k-test", blueprint_id="bp-test",
                   reason="test")


def germinate(growth: Growth, site: str, loader: Any = None) -> None:
    """GERMINATED and, at the next tick, TRAINING."""
    growth.obey(command(Action.GERMINATE, site), loader or ReadyLoader())
    growth.tick()


def to_full(growth: Growth, site: str) -> None:
    """From TRAINING through GRAFTING to STABILIZATION."""
    growth.obey(command(Action.ADVANCE, site))
    for _ in range(growth.graft_steps):
        growth.tick()


def stir(growth: Growth) -> None:
    """Move every seed parameter away from its birth, so that seeds change outputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for seed in growth.active() + growth.fossils():
            for p in seed.params:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
