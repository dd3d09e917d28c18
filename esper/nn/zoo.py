"""The blueprint zoo as ordinary modules: useful blocks, written in plain torch.

What `forward` says here is the truth. `esper.accelerate` may put a proven kernel in its place,
as it may for anybody's modules; `path` says which of the two runs. Parameters sit in torch's
own layers, so a block's state_dict is that of the same block written by hand.

Shapes: blocks over channels take [..., C]; those for maps take [B, C, H, W]. The output is
shaped as the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.nn.fast import path


class Block(nn.Module):
    """What the blocks share: they tell which path computes them."""

    @property
    def path(self) -> str:
        """ "plain", or the kernel that is installed; see `esper.nn.path`."""
        return path(self)

    def extra_repr(self) -> str:
        return f"path: {self.path}"


class Bottleneck(Block):
    """x + up(gelu(down(x))), [..., C]: an adapter (Houlsby et al. 2019)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class GatedMLP(Block):
    """down(silu(gate(x)) * up(x)), [..., C]: SwiGLU (Shazeer 2020), named as in LLaMA."""

    def __init__(self, channels: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(channels, hidden, bias=bias)
        self.up_proj = nn.Linear(channels, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LowRank(Block):
    """x + up(down(x)), [..., C], of rank `rank` (LoRA, Hu et al. 2021); `up` starts at zero."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class DepthwiseBlock(Block):
    """x + project(gelu(norm(depthwise(x)))), [B, C, H, W] (Chollet 2017; Liu et al. 2022).

    `kernel` is odd; `groups` of the normalisation divide `channels`.
    """

    def __init__(self, channels: int, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2,
                                   groups=channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.norm(self.depthwise(x))))


class SqueezeExcite(Block):
    """x * sigmoid(fc2(relu(fc1(mean(x))))), [B, C, H, W] (Hu et al. 2018).

    The state_dict is that of torchvision's SqueezeExcitation.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


class Attention(Block):
    """x + out(attention(norm(x))), [B, T, C]: pre-norm, few heads (Vaswani et al. 2017).

    `heads` divide `channels`; with `causal` position t sees positions up to t only.
    """

    def __init__(self, channels: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        n = self.norm(x)
        q, k, v = (
            layer(n).view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out_proj(y.transpose(1, 2).reshape(b, t, c))
