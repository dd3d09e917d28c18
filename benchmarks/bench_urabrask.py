"""How fast validated kernels are, and how long a verdict takes.

Every kernel is compiled STANDARD, proved and measured in processes of its own, on one thread,
beside eager and beside torch.compile with static shapes in the same process; the three take
turns in a random order. All raw samples are in the JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import FEATURES, MAP, TOKENS
from benchmarks.pairs import spread
from esper.karn.templates import (
    attention,
    bottleneck,
    depthwise_separable,
    gated,
    squeeze_excite,
    wide,
)
from esper.leyline.artifact import Pipeline
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.tezzeret.worker import Forge
from esper.urabrask.plan import QUICK, THOROUGH, Plan
from esper.urabrask.reports import to_benchmark_json
from esper.urabrask.service import Limits, examine_file

KERNELS: tuple[tuple[Callable[[SiteSignature], BlueprintIR], SiteSignature], ...] = (
    (bottleneck, FEATURES), (wide, FEATURES), (attention, TOKENS), (gated, TOKENS),
    (depthwise_separable, MAP), (squeeze_excite, MAP),
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("kernels")
    made = []
    with Forge() as forge:
        for template, signature in KERNELS:
            ir = template(signature)
            path = folder / f"{template.__name__}.esper"
            path.write_bytes(forge.compile(ir, signature, Pipeline.STANDARD))
            made.append((f"{ir.name} {signature.kind}", path))
    return made


def _examined(path: Path, plan: Plan) -> ValidationReport:
    limits = Limits(deadline_seconds=900, plan=plan)
    report = examine_file(path, path.stem, sha256(path.read_bytes()), limits)
    assert report is not None and report.accepted, report
    return report


@pytest.mark.slow
def test_speed_of_validated_kernels(
    benchmark: Any, artifacts: list[tuple[str, Path]]
) -> None:
    reports: dict[str, ValidationReport] = {}

    def examine_all() -> None:
        for name, path in artifacts:
            reports[name] = _examined(path, THOROUGH)

    benchmark.pedantic(examine_all, rounds=1)
    eager = [m.speedup for r in reports.values() for m in r.measurements]
    compiled = [
        statistics.median(m.compiled_seconds) / statistics.median(m.kernel_seconds)
        for r in reports.values() for m in r.measurements if m.compiled_seconds
    ]
    over_eager, over_compile = spread(eager), spread(compiled)
    benchmark.extra_info.update(
        target=">= 1.35 times eager (STANDARD); no kernel tagged fast below 1.05",
        over_eager=over_eager, over_compile=over_compile,
        kernels={name: (r.speedup, r.speedup_over_compile) for name, r in reports.items()},
        measurements=to_benchmark_json(list(reports.values()))["benchmarks"],
        untimed=True, speedups={
            "validated kernels, times as fast as eager": {
                f"{name}, batch {m.batch}": [m.speedup, m.low, m.high]
                for name, r in reports.items() for m in r.measurements},
            "validated kernels, times as fast as torch.compile": {
                name: [r.speedup_over_compile, None, None]
                for name, r in reports.items() if r.speedup_over_compile is not None},
        })
    for name, r in reports.items():
        shapes = ", ".join(f"{m.batch}: {m.speedup:.2f} [{m.low:.2f}, {m.high:.2f}]"
                           for m in r.measurements)
        over = r.speedup_over_compile
        print(f"\n{name}: {r.speedup:.2f} times eager, "
              f"{'not measured' if over is None else f'{over:.2f}'} times compile; {shapes}")
    print(f"\nover eager {over_eager}\nover torch.compile {over_compile}")


@pytest.mark.slow
def test_time_of_a_verdict(benchmark: Any, artifacts: list[tuple[str, Path]]) -> None:
    """As in the pipeline: both processes, imports included, at two batch sizes."""
    paths = iter([path for _, path in artifacts])
    benchmark.extra_info["target"] = "bounded; a kernel every half minute beside a training run"
    benchmark.pedantic(lambda: _examined(next(paths), QUICK), rounds=len(artifacts))
