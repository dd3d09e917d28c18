"""Small hosts in plain torch, and the residual blocks that a fixed-schedule grower puts into them.

The last layer of every block starts at zero, so that the model computes as before when one comes
in. Nothing here knows of esper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Along(nn.Module):
    """A convolution along a sequence: [B, T, C] to [B, T, out]."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


# -- MNIST-1D -----------------------------------------------------------------------------


class Sequences(nn.Module):
    """Forty numbers to ten classes: a stem that sees five numbers at a time, and layers that see
    no more. Room to grow is in looking further, and in width."""

    def __init__(self, width: int = 8, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, stride=2, padding=2)
        self.layers = nn.ModuleList(
            Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(layers)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.unsqueeze(1))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def sequence_block(channels: int, times: int = 2, kernel: int = 5) -> nn.Module:
    return Residual(nn.LayerNorm(channels), Along(channels, times * channels, kernel), nn.GELU(),
                    zeroed(nn.Linear(times * channels, channels)))


# -- Fashion-MNIST ------------------------------------------------------------------------


class Convolution(nn.Module):
    """relu(norm(conv(x)))."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Pictures(nn.Module):
    """28x28 (or 8x8) grey images to ten classes: two narrow stages."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.first = Convolution(1, width, stride=2)
        self.second = Convolution(width, 2 * width, stride=2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def picture_block(channels: int) -> nn.Module:
    return Residual(Convolution(channels, channels),
                    zeroed(nn.Conv2d(channels, channels, 3, padding=1)))


# -- teacher and student ------------------------------------------------------------------


class Student(nn.Module):
    """Twenty numbers to ten, through one hidden layer that is too small for the teacher's."""

    def __init__(self, inputs: int = 20, hidden: int = 8, outputs: int = 10) -> None:
        super().__init__()
        self.lift = nn.Linear(inputs, inputs)
        self.hidden = Residual(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, inputs))
        self.out = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.lift(x)))


def number_block(channels: int, times: int = 1) -> nn.Module:
    return Residual(nn.Linear(channels, times * channels), nn.ReLU(),
                    zeroed(nn.Linear(times * channels, channels)))


# -- text ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention; its output is mixed by a layer that may start at zero."""

    def __init__(self, width: int, heads: int, at_zero: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = zeroed(mix) if at_zero else mix

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mix(seen.transpose(1, 2).reshape(b, t, c))


def layer(width: int, heads: int, times: int = 2, at_zero: bool = False) -> nn.Module:
    """A pre-norm transformer layer."""
    down = nn.Linear(times * width, width)
    return nn.Sequential(
        Residual(nn.LayerNorm(width), Attention(width, heads, at_zero)),
        Residual(nn.LayerNorm(width), nn.Linear(width, times * width), nn.GELU(),
                 zeroed(down) if at_zero else down),
    )


class Text(nn.Module):
    """Predicts the next character: [B, T] of symbols to [B, T, symbols]."""

    def __init__(
        self, symbols: int = 128, width: int = 32, layers: int = 2, heads: int = 2,
        context: int = 64,
    ) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        x = self.symbol(text) + self.place[: text.shape[1]]
        for each in self.layers:
            x = each(x)
        return self.head(self.norm(x))


def text_block(channels: int, heads: int = 2) -> nn.Module:
    """A whole layer, as progressive stacking adds them."""
    return layer(channels, heads, at_zero=True)
