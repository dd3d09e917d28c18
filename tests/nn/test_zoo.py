"""The blocks are the same as their twins by hand: parameters, outputs, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper


class ByHand(nn.Module):
    """Layers by name, and what is computed with them."""

    def __init__(self, layers: dict[str, nn.Module], compute: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def attend(m: Any, x: Tensor) -> Tensor:
    n = m.norm(x)
    # Written out: rows of softmax(q k' / sqrt(d)) v, two heads of width 4, no later position.
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        q, k, v = (layer(n)[..., i] for layer in (m.q_proj, m.k_proj, m.v_proj))
        scores = q @ k.mT / 2.0
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    return x + m.out_proj(torch.cat(heads, -1))


def linear(a: int, b: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(a, b, bias)


TWINS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "Bottleneck": (
        esper.nn.Bottleneck(8, 3),
        ByHand({"down": linear(8, 3), "up": linear(3, 8)},
               lambda m, x: x + m.up(F.gelu(m.down(x)))), (2, 5, 8)),
    "GatedMLP": (
        esper.nn.GatedMLP(8, 12),
        ByHand({"gate_proj": linear(8, 12, False), "up_proj": linear(8, 12, False),
                "down_proj": linear(12, 8, False)},
               lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))), (2, 5, 8)),
    "LowRank": (
        esper.nn.LowRank(8, 2),
        ByHand({"down": linear(8, 2, False), "up": linear(2, 8, False)},
               lambda m, x: x + x @ (m.up.weight @ m.down.weight).T), (5, 8)),
    "DepthwiseBlock": (
        esper.nn.DepthwiseBlock(8, 3, groups=2),
        ByHand({"depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                "norm": nn.GroupNorm(2, 8), "project": nn.Conv2d(8, 8, 1)},
               lambda m, x: x + m.project(F.gelu(m.norm(m.depthwise(x))))), (2, 8, 5, 6)),
    "SqueezeExcite": (
        esper.nn.SqueezeExcite(8, 4),
        ByHand({"fc1": nn.Conv2d(8, 4, 1), "fc2": nn.Conv2d(4, 8, 1)},
               lambda m, x: x * torch.sigmoid(m.fc2(F.relu(m.fc1(
                   F.adaptive_avg_pool2d(x, 1)))))), (2, 8, 5, 6)),
    "Attention": (
        esper.nn.Attention(8, 2, causal=True),
        ByHand({"norm": nn.LayerNorm(8), "q_proj": linear(8, 8, False),
                "k_proj": linear(8, 8, False), "v_proj": linear(8, 8, False),
                "out_proj": linear(8, 8)}, attend), (2, 5, 8)),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_block_and_its_twin(name: str) -> None:
    block, twin, shape = TWINS[name]
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    assert list(block.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(block.state_dict())
    block.load_state_dict(twin.state_dict())
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(block(x), twin(x))
    g = torch.randn(shape)
    for ours, theirs in zip(torch.autograd.grad(block(x), [x, *block.parameters()], g),
                            torch.autograd.grad(twin(x), [x, *twin.parameters()], g),
                            strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_low_rank_block_starts_as_nothing() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(esper.nn.LowRank(8, 2)(x), x)


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide 8"):
        esper.nn.Attention(8, 3)


def test_the_blend() -> None:
    blend = esper.nn.Blend(0.25)
    h, s = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(blend(h, s), torch.lerp(h, s, 0.25))
    assert not blend.state_dict() and repr(blend) == "Blend(alpha=0.25)"
    blend.alpha = 1.0
    assert blend(h, s) is s
