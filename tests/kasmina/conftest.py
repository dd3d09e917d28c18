"""What the suites over both faces of a runner share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper.kasmina import native, plain_kernel
from esper.kasmina.runner import PlainRunner
from tests.csrc.pair import BACKWARD_INPUTS, GRADIENTS, compile_pair


@pytest.fixture(params=["extension", "python"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """(params) -> a runner of the pair; all runners of one test share the kernel.

    `gradients=` opens another kernel, with that in its manifest.
    """
    kernel_type: Any = plain_kernel.SeedKernel
    runner_type: Any = PlainRunner
    if request.param == "extension":
        extension: Any = native.extension()
        kernel_type, runner_type = extension.SeedKernel, extension.RunningSeed
    shared = kernel_type(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)

    def made(params: list[Any], gradients: list[int] | None = None) -> Any:
        if gradients is None:
            return runner_type(shared, params)
        return runner_type(kernel_type(*compile_pair(), BACKWARD_INPUTS, gradients), params)

    return made
