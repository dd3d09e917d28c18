"""What FAST, STANDARD and AGGRESSIVE cost and what they give, over a handful of the zoo.

Each blueprint is compiled by all three pipelines in a warm forge. Their kernels and eager torch
then take turns in one process, on one thread, in a random order, forward and backward, at three
sizes. The means are geometric, their intervals from a bootstrap over blueprints and sizes.

ESPER_BENCH_BLUEPRINTS=2 takes the first two blueprints only, to see that it runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernels import FEATURES, MAP, TOKENS
from benchmarks.pairs import spread
from esper.karn.templates import (
    attention,
    bottleneck,
    bottleneck_conv,
    depthwise_separable,
    gated,
    inverted_residual,
    token_mixer,
    wide,
)
from esper.kasmina.artifact import open_artifact
from esper.leyline.artifact import Pipeline
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.worker import Forge
from esper.urabrask.bench import compare, interval
from esper.urabrask.oracle import reference_kernel
from esper.urabrask.sides import Side, problems

ZOO: tuple[tuple[Callable[[SiteSignature], BlueprintIR], SiteSignature], ...] = (
    (depthwise_separable, MAP), (bottleneck, FEATURES), (gated, TOKENS), (token_mixer, TOKENS),
    (bottleneck_conv, MAP), (attention, TOKENS), (wide, FEATURES), (inverted_residual, MAP),
)
SIZES = {
    SiteKind.FEATURES: ((4, 8), (64, 8), (512, 8)),
    SiteKind.TOKENS: ((1, 16), (8, 32), (32, 64)),
    SiteKind.MAP: ((1, 8), (8, 16), (32, 16)),
}
TARGETS = {"STANDARD": ">= 1.35", "AGGRESSIVE": ">= 1.5"}
SECONDS = 4.0  # of measuring at one size


def _compiled(
    forge: Forge, ir: BlueprintIR, signature: SiteSignature, folder: Path
) -> dict[Pipeline, tuple[Path, float]]:
    made = {}
    for pipeline in Pipeline:
        started = time.perf_counter()
        content = forge.compile(ir, signature, pipeline)
        seconds = time.perf_counter() - started
        path = folder / f"{ir.id}-{signature.kind}-{pipeline}.esper"
        path.write_bytes(content)
        made[pipeline] = path, seconds
    return made


def _measured(
    ir: BlueprintIR, signature: SiteSignature, paths: dict[Pipeline, Path], size: tuple[int, int]
) -> dict[str, Any]:
    """Seconds of every side at one size, sample by sample, in the same rounds."""
    drawn = problems(ir, signature, *size)
    sides = {"eager": Side(reference_kernel(ir, signature), drawn)}
    for pipeline, path in paths.items():
        kernel = open_artifact(path, sha256(path.read_bytes()), signature).kernel
        sides[pipeline] = Side(kernel, drawn)
        sides[pipeline]()
        assert not (wrong := sides[pipeline].objection(ir, signature)), (pipeline, wrong)
    first, second, *others = sides.values()
    found = compare(first, second, *others, budget_seconds=SECONDS)
    assert not found.objection, found.objection
    return dict(zip(sides, (found.kernel, found.eager, *found.others), strict=True))


@dataclass
class Found:
    """By blueprint and size: [times as fast as eager, low, high] by pipeline, and raw samples."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)


def _look_at(
    forge: Forge, ir: BlueprintIR, signature: SiteSignature, folder: Path, found: Found
) -> None:
    made = _compiled(forge, ir, signature, folder)
    for pipeline, (_, spent) in made.items():
        found.seconds[pipeline].append(spent)
    print(f"\n{ir.name} {signature.kind}: " + ", ".join(
        f"{pipeline} compiled in {spent:.1f} s" for pipeline, (_, spent) in made.items()))
    rng = np.random.default_rng(0)
    for size in SIZES[signature.kind]:
        taken = _measured(ir, signature, {p: path for p, (path, _) in made.items()}, size)
        row = {str(p): list(interval(taken[p], taken["eager"], rng)) for p in Pipeline}
        name = f"{ir.name} {list(signature.shape(*size))}"
        found.rows[name], found.samples[name] = row, taken
        print(f"  {name}: eager {statistics.median(taken['eager']) * 1e6:.0f} us; " + ", ".join(
            f"{p} {r:.2f} [{low:.2f}, {high:.2f}]" for p, (r, low, high) in row.items()))


def _means(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    means = {f"{p} / eager": spread([row[p][0] for row in rows.values()]) for p in Pipeline}
    for better, worse in ((Pipeline.STANDARD, Pipeline.FAST),
                          (Pipeline.AGGRESSIVE, Pipeline.STANDARD)):
        means[f"{better} / {worse}"] = spread(
            [row[better][0] / row[worse][0] for row in rows.values()])
    return means


@pytest.mark.slow
def test_three_pipelines(benchmark: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    zoo = ZOO[:int(os.environ.get("ESPER_BENCH_BLUEPRINTS", len(ZOO)))]
    found = Found()

    def look_at_all() -> None:
        with Forge() as forge:
            for pipeline in Pipeline:  # precompiled headers, once per machine
                forge.compile(bottleneck(FEATURES), FEATURES, pipeline)
            for template, signature in zoo:
                _look_at(forge, template(signature), signature, tmp_path, found)

    benchmark.pedantic(look_at_all, rounds=1)
    means = _means(found.rows)
    for name, mean in means.items():
        print(f"\n{name}, times as fast: {mean['ratio']:.2f} [{mean['low']:.2f}, "
              f"{mean['high']:.2f}], from {mean['least']:.2f} to {mean['most']:.2f}")
    for pipeline, spent in found.seconds.items():
        print(f"{pipeline} compiles in {statistics.median(spent):.1f} s, "
              f"{min(spent):.1f} to {max(spent):.1f}")
    benchmark.extra_info.update(
        target=TARGETS, means=means, rows=found.rows, samples=found.samples,
        compile_seconds=dict(found.seconds), untimed=True,
        speedups={f"{p}, times as fast as eager": {n: row[p] for n, row in found.rows.items()}
                  for p in Pipeline},
    )
