"""The zoo's blocks with a kernel, beside their plain twins and torch.compile of the twins.

One call is a training step of one block: forward, and backward to the input and every
parameter. What is timed is the module call itself, so guards, lookups and the crossing to C++
count. torch.compile is given static shapes, and is warm. All on one thread. Every kernel is
timed, those that `accelerate` would refuse as too slow included.

A kernel takes its library from ESPER_BENCH_LIBRARY where that is set, else from a fresh one:
six blocks are compiled and proved then, which takes minutes.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from benchmarks.pairs import Pair, alternate
from esper.leyline.artifact import Pipeline
from esper.nn.accelerate import prepare
from esper.nn.provide import Provider
from esper.urza.library import LocalLibrary

TOKENS, MAPS = ((4, 16, 64), (16, 64, 64)), ((4, 64, 8, 8), (16, 64, 16, 16))
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "bottleneck": (lambda: esper.nn.Bottleneck(64, 32), TOKENS),
    "gated mlp": (lambda: esper.nn.GatedMLP(64, 172), TOKENS),
    "low rank": (lambda: esper.nn.LowRank(64, 8), TOKENS),
    "depthwise": (lambda: esper.nn.DepthwiseBlock(64), MAPS),
    "squeeze excite": (lambda: esper.nn.SqueezeExcite(64, 16), MAPS),
    "attention": (lambda: esper.nn.Attention(64, 4), TOKENS),
}
TARGET = {Pipeline.STANDARD: 1.35, Pipeline.AGGRESSIVE: 1.5}


def stepper(module: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    x = torch.randn(shape, requires_grad=True)
    leaves = [x, *module.parameters()]
    gradient = torch.randn(shape)
    return lambda: torch.autograd.grad(module(x), leaves, gradient)


def speedup(pair: Pair) -> tuple[float, float, float]:
    """The peer's time over ours, with its 95 % interval."""
    ratio, low, high = pair.ratio()
    return 1 / ratio, 1 / high, 1 / low


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def speedups(rows: dict[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """For the page: every block's speedup over both peers, and the means of the zoo."""
    return {
        f"zoo, {pipeline}, times as fast as {peer}": {
            **{name: list(row[over]) for name, row in rows.items()},
            "geometric mean": [mean([row[over][0] for row in rows.values()]), None, None],
        }
        for over, peer in (("over_eager", "eager"), ("over_compile", "torch.compile"))
    }


@pytest.mark.parametrize("pipeline", list(TARGET))
def test_the_zoo(benchmark: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    library = LocalLibrary(os.environ.get("ESPER_BENCH_LIBRARY", tmp_path))
    rows: dict[str, Any] = {}
    with Provider(library, pipeline, print) as provider:
        for name, (make, shapes) in ZOO.items():
            for shape in shapes:
                plain = make()
                fast, peer = copy.deepcopy(plain), torch.compile(copy.deepcopy(plain),
                                                                 dynamic=False)
                fast.__dict__["forward"] = prepare(name, fast, torch.zeros(shape), provider)
                assert esper.nn.path(fast, torch.zeros(shape)).startswith("kernel")
                ours = stepper(fast, shape)
                inner = 20 if math.prod(shape) < 1 << 14 else 2
                eager = alternate(ours, stepper(plain, shape), rounds=60, inner=inner)
                compiled = alternate(ours, stepper(peer, shape), rounds=60, inner=inner)
                rows[f"{name} {list(shape)}"] = {
                    "over_eager": speedup(eager), "over_compile": speedup(compiled),
                    "ours_seconds": eager.ours, "eager_seconds": eager.peer,
                    "compile_seconds": compiled.peer,
                }
                print(f"\n{name} {list(shape)}: eager / ours "
                      "{:.2f} [{:.2f}, {:.2f}]".format(*speedup(eager)),
                      "torch.compile / ours {:.2f} [{:.2f}, {:.2f}]".format(*speedup(compiled)))
    over_eager = mean([r["over_eager"][0] for r in rows.values()])
    over_compile = mean([r["over_compile"][0] for r in rows.values()])
    print(f"\n{pipeline}: geometric mean over the zoo: {over_eager:.2f} times eager (target >= "
          f"{TARGET[pipeline]}), {over_compile:.2f} times torch.compile")
    benchmark.extra_info.update(
        rows=rows, over_eager=over_eager, over_compile=over_compile, target=TARGET[pipeline],
        untimed=True, speedups=speedups(rows, pipeline),
    )
    benchmark.pedantic(ours, rounds=20)
