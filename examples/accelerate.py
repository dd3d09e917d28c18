"""Kernels in the place of modules that were not written for esper.

    python examples/accelerate.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import esper


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


model = nn.Sequential(nn.Linear(16, 32), MLP(32), MLP(32), nn.BatchNorm1d(32), nn.Linear(32, 10))
x = torch.randn(64, 16)
report = esper.accelerate(model, example=x, library="library")  # prints what it did, and why
model(x).square().mean().backward()  # trains as ever, with the same state_dict
print(esper.nn.path(model[1], x @ torch.randn(16, 32)))
report.undo()
