"""The opponent: plain torch, harmless when it grows, and `big` in the end."""

from __future__ import annotations

import ast
import inspect

import torch
from torch import nn

from esper.evaluation import fixed
from esper.evaluation.fixed import FixedGrower, put_behind


def _host() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
                         nn.Linear(4, 2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_nothing_of_esper_is_in_it() -> None:
    tree = ast.parse(inspect.getsource(fixed))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names and not any(n.startswith("esper") for n in names)


def test_it_grows_on_time_disturbs_nothing_and_ends_as_the_big_model() -> None:
    torch.manual_seed(0)
    model = _host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = FixedGrower(model, optimizer, ["0", "1"], lambda site: _Block(), 3, 2, 2)
    x, y = torch.randn(16, 6), torch.randn(16, 2)
    grown = []
    for epoch in range(1, 8):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        before = model(x)
        if grower.end_of_epoch(epoch):
            grown.append(epoch)
        assert torch.equal(model(x), before), "its last layer starts at zero"
    assert grown == [2, 4, 6]
    big = _host()
    for site in ("0", "1", "0"):
        put_behind(big, site, _Block())
    assert str(model) == str(big)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, big)]
    assert shapes[0] == shapes[1]
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "each exactly once"
    assert all(p in optimizer.state for p in model.parameters()), "all of them learn"
