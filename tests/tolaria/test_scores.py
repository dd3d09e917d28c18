"""A site's score: what of the gradient can be told from the activations, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esper.leyline.signature import SiteKind, SiteSignature
from esper.tolaria.scores import Statistic

WIDTH = 12
H = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0))


def score(h: Tensor, g: Tensor, kind: SiteKind = SiteKind.FEATURES, batches: int = 4) -> float:
    statistic = Statistic(SiteSignature(kind=kind, channels=h.shape[1 if h.ndim == 4 else -1]))
    for x, y in zip(h.chunk(batches), g.chunk(batches), strict=True):
        statistic.add(x, y)
    return statistic.score()


def norm(g: Tensor) -> float:
    return float(g.square().sum(1).mean().sqrt())


def test_what_a_seed_could_follow_counts_and_noise_does_not() -> None:
    told = (H @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).abs()
    told = told - told.mean(0)
    noise = torch.randn(told.shape, generator=torch.Generator().manual_seed(2)) * norm(told)
    noise *= norm(told) / norm(noise)
    assert 0.5 < score(H, told) <= 1
    assert score(H, noise) < 0.05
    assert score(H, told + noise) == pytest.approx(score(H, told) / 2, rel=0.15)
    assert score(H, told + 5) == pytest.approx(score(H, told)), "a bias of the host does that"
    assert score(H, told.new_full(told.shape, 0.1)) == 0 == score(H, torch.zeros_like(told))


def test_scales_do_not_matter() -> None:
    g = torch.relu(H)
    assert score(H, 3e-6 * g) == pytest.approx(score(H, g))
    assert score(100 * H + 7, g) == pytest.approx(score(H, g), rel=1e-4)
    dead = torch.cat([H, torch.zeros(len(H), 4)], 1)
    assert 0 < score(dead, torch.cat([g, g[:, :4]], 1)) <= 1, "channels that are off are borne"


def test_a_map_is_its_positions_and_none_of_them_is_overlooked() -> None:
    g = torch.relu(H)

    def as_map(t: Tensor, *shape: int) -> Tensor:
        return t.view(-1, *shape, WIDTH).movedim(-1, 1)

    assert score(as_map(H, 4, 2), as_map(g, 4, 2), SiteKind.MAP) == pytest.approx(score(H, g))
    assert score(H.view(-1, 8, WIDTH), g.view(-1, 8, WIDTH), SiteKind.TOKENS) == pytest.approx(
        score(H, g))
    large = torch.randn(64 * 500, WIDTH, generator=torch.Generator().manual_seed(3))
    column = torch.relu(as_map(large, 8, 8))
    column[..., :5], column[..., 6:] = 0, 0
    seen = score(as_map(large, 8, 8), column, SiteKind.MAP, batches=1)
    every = score(as_map(large, 8, 8), torch.relu(as_map(large, 8, 8)), SiteKind.MAP, batches=1)
    assert 0.05 < seen < every
