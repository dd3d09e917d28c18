"""What a kernel must leave alone, and what it must not count on."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from esper.leyline.mode import FULL
from esper.urabrask import conduct
from esper.urabrask.problems import Case, draw
from esper.urabrask.proof import prove
from tests.urabrask.test_proof import FEATURES, HONEST, SITE

PROBLEM = draw(FEATURES, SITE, Case(3, 5, 0.3, FULL), 0)
poison = pytest.mark.skipif(
    not conduct.CAN_POISON, reason="fresh memory can be filled by the GNU C library only"
)


@poison
@pytest.mark.parametrize("elements", [3, 1000, 1 << 22])
def test_fresh_memory_is_full_of_the_poison(elements: int) -> None:
    with conduct.poisoned(0xFE):
        fresh = torch.empty(elements, dtype=torch.uint8)
        assert int(fresh.min()) == int(fresh.max()) == 0xFE


@poison
def test_a_kernel_that_counts_on_zeros_is_refused() -> None:
    """Pages that come from the system are zero, so this one is right in every other check."""

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        out = HONEST(h, params, alpha, mode)
        if mode != FULL or alpha in (0, 1):
            return out
        sums = torch.empty(1 << 25)  # too large for anything but pages of its own
        return out + sums[: out.numel()].view_as(out)

    assert "output depends on uninitialised memory" in conduct.unwritten(kernel, PROBLEM)
    proof = prove(kernel, FEATURES, SITE)
    assert proof.reason.startswith("memory written before it is read"), proof.reason
    assert conduct.unwritten(HONEST, PROBLEM) == ""


def test_a_kernel_that_draws_from_the_hosts_random_numbers_is_refused() -> None:
    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        return HONEST(h, params, alpha, mode) + 0 * torch.rand(())

    assert conduct.meddling(kernel, PROBLEM) == (
        "the kernel changes the state of the random numbers"
    )


@pytest.mark.parametrize("name", ["perf_counter", "monotonic"])
def test_a_kernel_that_replaces_a_clock_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(time, name)

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        monkeypatch.setattr(time, name, lambda: real() / 2)
        return HONEST(h, params, alpha, mode)

    proof = prove(kernel, FEATURES, SITE)
    monkeypatch.undo()
    assert proof.reason == f"process untouched: the kernel replaces time.{name}"


def test_an_honest_kernel_changes_nothing() -> None:
    assert conduct.meddling(HONEST, PROBLEM) == ""
