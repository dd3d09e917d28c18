"""What is a site and what only looks like one, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import SiteError
from esper.kasmina.growth import growth_of
from tests.support import mlp

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.wide, self.out = nn.ReLU(), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.wide(self.act(x))))


def test_calls_of_two_widths_are_refused_by_name() -> None:
    with pytest.raises(SiteError, match=r"'act': called 2 times.*\[5, 8\].*\[5, 12\].*one width"):
        esper.wrap(Uneven(), sites=["act"], example=X)


class ChannelsAside(nn.Module):
    """[B, C, H, W] outside, [B, H, W, C] inside, as in a ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mlp = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(-1)


@pytest.mark.parametrize(
    ("model", "shape", "site", "layout"),
    [
        (ChannelsAside(), (2, 3, 9, 9), "mlp", "B, H, W, C"),
        (ChannelsAside(), (2, 3, 9, 9), "mlp.0", "B, H, W, C"),
        (ChannelsAside(), (2, 3, 10, 10), "mlp.0", "B, H, W, C"),  # C == H == W
        (ChannelsAside(), (2, 3, 9, 9), "mlp.1", "B, H, W, C"),
        (Signal(), (2, 3, 9), "body", "B, C, L"),
        (Signal(), (2, 3, 9), "body.1", "B, C, L"),
        (Signal(), (2, 3, 10), "body.0", "B, C, L"),  # C == L
    ],
)
def test_layouts_that_only_look_like_sites_are_refused(
    model: nn.Module, shape: tuple[int, ...], site: str, layout: str
) -> None:
    with pytest.raises(SiteError, match=rf"'{site}': \w+ gives \[{layout}\]"):
        esper.wrap(model, sites=[site], example=torch.randn(shape))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 3))
    with pytest.raises(SiteError, match="'0': it is a TorchScript module"):
        esper.wrap(model, sites=["0"], example=X)


def test_a_wrapped_part_is_found_in_the_whole() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mlp(), mlp()

    whole = Whole()
    x = torch.randn(2, 16)
    esper.wrap(whole.first, sites=["1"], example=x)
    assert growth_of(whole) is growth_of(whole.first)
    with pytest.raises(SiteError, match="its module 'first' is wrapped already"):
        esper.wrap(whole, sites=["second.1"], example=x)
    esper.wrap(whole.second, sites=["1"], example=x)
    with pytest.raises(SiteError, match="several modules of the model are wrapped: first, second"):
        growth_of(whole)
