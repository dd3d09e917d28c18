"""Three small models in plain torch. None of them knows of esper."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """x + relu(norm(conv(x))): the simplest residual block that trains well."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class DigitsCNN(nn.Module):
    """8x8 grey images to 10 classes. Narrow on purpose, so that there is something to grow."""

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class FashionCNN(nn.Module):
    """28x28 grey images to 10 classes: two residual stages with pooling in between."""

    def __init__(self, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.first = Block(width)
        self.widen = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.second = Block(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(self.stem(x)))
        x = self.second(torch.relu(self.widen(x)))
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(b, t, c))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TextTransformer(nn.Module):
    """Predicts the next character: [B, T] of symbols to [B, T, symbols]."""

    def __init__(
        self, symbols: int = 128, width: int = 32, layers: int = 2, heads: int = 2,
        context: int = 64,
    ) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        x = self.symbol(text) + self.place[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
