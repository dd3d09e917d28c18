"""What modules return, and the tensor in it that grows."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina.output import first_tensor, with_tensor

H, NEW, SCALAR = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(1.0)
Named = namedtuple("Named", "loss hidden")


@dataclass(frozen=True)
class Frozen:
    loss: Any
    hidden: Tensor
    more: Any = None


class Derived(tuple):
    pass


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ((H,), 0),
        ((H, None), 0),
        ((SCALAR, H, "text"), 1),
        ((torch.tensor([[1]]), H), 1),
        (Named(None, H), "hidden"),
        (Derived((H, 1)), 0),
        ([SCALAR, H], 1),
        (OrderedDict(loss=SCALAR, hidden=H), "hidden"),
        (Frozen(SCALAR, H, more=(1,)), "hidden"),
        (torch.max(H, dim=1, keepdim=True), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_tensor_is_found_and_replaced_in_a_copy(output: Any, place: Any) -> None:
    h = first_tensor(output)
    grown = with_tensor(output, NEW)

    def at(where: Any) -> Any:
        return getattr(where, place) if isinstance(place, str) and not isinstance(
            where, dict) else where[place]

    assert type(grown) is type(output)
    assert at(output) is h and at(grown) is NEW, "the module's own output is as it was"
    others = [p for p in _parts(output) if p is not h]
    assert [id(p) for p in _parts(grown) if p is not NEW] == [id(p) for p in others]


def _parts(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())
    return list(vars(output).values()) if isinstance(output, Frozen) else list(output)


def test_a_tensor_is_itself_and_what_holds_none_has_none() -> None:
    assert first_tensor(SCALAR) is SCALAR and with_tensor(H, NEW) is NEW
    for nothing in (None, (), (SCALAR,), {"mask": torch.tensor([[True]])}, "text", 3):
        assert first_tensor(nothing) is None
