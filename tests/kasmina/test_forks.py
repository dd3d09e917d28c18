"""A child of fork(2) runs kernels and slots, whatever the parent's threads are at."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esper.kasmina import native
from esper.kasmina.sites import Found
from esper.kasmina.slot import Slot
from esper.leyline.mode import FULL
from esper.leyline.signature import SiteKind, SiteSignature
from tests.csrc.pair import BACKWARD_INPUTS, CHANNELS, GRADIENTS, compile_pair, parameters

# A child that waits for what nobody will let go of waits for ever; one that is only slow does not.
DEADLINE = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")]


def in_child(work: Callable[[], None]) -> int | None:
    """The exit code of a forked child that did `work`; None where it hung, and was ended."""

    def run() -> None:
        torch.set_num_threads(1)  # as in a data loader's worker: OpenMP's threads are the parent's
        work()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(DEADLINE)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code


def new_slot() -> Slot:
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=CHANNELS)
    return Slot(Found("site", nn.Identity(), signature, 1))


def test_a_child_calls_makes_and_closes_slots() -> None:
    extension: Any = native.extension()
    kernel = extension.SeedKernel(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)
    runner = extension.RunningSeed(kernel, parameters())
    slot, h = new_slot(), torch.randn(4, CHANNELS)
    runner.set(0.5, FULL)
    slot._native.set_seeds([runner])
    want = torch.ops.esper.slot(h, None, slot.number)

    def work() -> None:
        torch.testing.assert_close(torch.ops.esper.slot(h, None, slot.number), want)
        other = new_slot()
        other._native.set_seeds([runner])
        torch.testing.assert_close(torch.ops.esper.slot(h, None, other.number), want)
        other.close()
        del other
        slot._native.set_seeds([])
        assert torch.equal(torch.ops.esper.slot(h, None, slot.number), h)

    assert in_child(work) == 0
    torch.testing.assert_close(torch.ops.esper.slot(h, None, slot.number), want)
    slot.close()


def test_a_child_that_is_made_while_a_thread_runs_the_kernel(make: Any) -> None:
    params = parameters()
    runner = make(params)
    runner.set(0.5, FULL)
    h = torch.randn(4, CHANNELS, requires_grad=True)  # autograd's own backward refuses a fork
    want = runner(h).detach()
    large, over = torch.randn(4096, CHANNELS), threading.Event()
    errors: list[BaseException] = []

    def train() -> None:
        try:
            while not over.is_set():
                runner(large).sum().backward()
        except BaseException as e:
            errors.append(e)

    def work() -> None:
        torch.testing.assert_close(runner(h).detach(), want)
        assert not runner.failure

    threads = [threading.Thread(target=train) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        codes: list[int | None] = []
        while len(codes) < 6 and all(code == 0 for code in codes):
            codes.append(in_child(work))
    finally:
        over.set()
        for t in threads:
            t.join()
    assert codes == [0] * 6 and not errors and not runner.failure
