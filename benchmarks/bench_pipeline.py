"""Blueprints an hour through `esper serve` and two workers, and where their seconds go.

Real processes on an empty library: one server, one Tezzeret, one Urabrask, which want the cores at
the same time. The clock runs from the submission of the first blueprint to the verdict on the last
kernel; one blueprint that is not counted goes first, so that the forge is warm, as it is in a
service that has run for a minute. The stages are read from the library's own history: a
blueprint's from its claim to its kernel's record, a kernel's from its claim to its verdict. How
much of the latter is proof and how much measurement is found out afterwards, with each stage
alone on the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from benchmarks.kernels import FEATURES, MAP, TOKENS
from esper.karn.templates import templates_for
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature
from esper.urabrask import service as urabrask
from esper.urza.library import LocalLibrary

SIGNATURES = (FEATURES, TOKENS, MAP)
EACH = 2  # blueprints per signature
DEADLINE = 900.0


@contextmanager
def command(*arguments: str, log: Path) -> Iterator[None]:
    with log.open("ab") as out:
        running = subprocess.Popen([sys.executable, "-m", "esper.cli.main", *arguments],
                                   stdout=out, stderr=out, env=dict(os.environ))
    try:
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def finished(library: LocalLibrary, count: int) -> list[KernelRecord] | None:
    """All kernels, once `count` blueprints have come to their end."""
    blueprints, kernels = library.blueprints(), library.kernels()
    ended = [b for b in blueprints
             if b.status in (BlueprintStatus.COMPILED, BlueprintStatus.INVALID)]
    judged = all(k.status in (KernelStatus.VALIDATED, KernelStatus.REJECTED) for k in kernels)
    return kernels if len(ended) == count and judged else None


def wait_for(library: LocalLibrary, count: int, log: Path) -> list[KernelRecord]:
    end = time.monotonic() + DEADLINE
    while (kernels := finished(library, count)) is None:
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.1)
    return kernels


def spent(library: LocalLibrary, item: str, during: str) -> float:
    """Seconds from the last claim of `item` to what came of it."""
    changes = library.history(item)
    start = next(c for c in reversed(changes) if c.after == during)
    return next(c for c in changes if c.before == during and c.sequence > start.sequence
                ).time - start.time


def stage_alone(library: LocalLibrary, kernel: KernelRecord, measure: bool) -> tuple[float, float]:
    """(wall seconds of one stage of Urabrask's, seconds of it after its process was ready)."""
    limits = urabrask.Limits()
    started = time.perf_counter()
    report = urabrask._in_child(library.fetch(kernel.digest), kernel.kernel_id, kernel.digest,
                                limits, (), limits.plan if measure else None)
    assert report is not None and report.accepted, report
    return time.perf_counter() - started, report.seconds


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [Pipeline.FAST, Pipeline.STANDARD])
def test_blueprints_an_hour(benchmark: Any, tmp_path: Path, pipeline: Pipeline) -> None:
    library, log = LocalLibrary(tmp_path / "library"), tmp_path / "log"
    address = f"unix:{tmp_path}/s"
    work: list[tuple[BlueprintIR, SiteSignature]] = [
        (ir, s) for s in SIGNATURES for ir in templates_for(s)[:EACH]]
    first = (templates_for(SIGNATURES[0])[EACH], SIGNATURES[0])
    with (
        command("serve", "--library", str(library.root), "--listen", address, log=log),
        command("worker", "tezzeret", "--urza", address, "--pipeline", pipeline, log=log),
        command("worker", "urabrask", "--urza", address, log=log),
    ):
        library.submit(*first, author="benchmark")
        known = wait_for(library, 1, log)
        started = time.perf_counter()
        for ir, signature in work:
            library.submit(ir, signature, author="benchmark")
        kernels = [k for k in wait_for(library, 1 + len(work), log) if k not in known]
        seconds = time.perf_counter() - started
    per_hour = 3600 * len(work) / seconds
    judged = [k for k in kernels if k.report is not None]
    alone = {(name, measure): stage_alone(library, kernel, measure)
             for measure in (False, True)
             for name, kernel in {str(k.manifest.signature): k for k in judged
                                  if k.status is KernelStatus.VALIDATED}.items()}
    stages = {
        "compile stage": fmean(spent(library, k.blueprint_id, "COMPILING") for k in kernels),
        "of which compiling": fmean(k.manifest.compile_seconds for k in kernels),
        "verdict stage": fmean(spent(library, k.kernel_id, "BENCHMARKING") for k in kernels),
        "of which at work": fmean(k.report.seconds for k in judged if k.report is not None),
        "proof alone": fmean(wall for (_, m), (wall, _) in alone.items() if not m),
        "of which proving": fmean(inner for (_, m), (_, inner) in alone.items() if not m),
        "measurement alone": fmean(wall for (_, m), (wall, _) in alone.items() if m),
        "of which measuring": fmean(inner for (_, m), (_, inner) in alone.items() if m),
    }
    print(f"\n{pipeline}: {len(work)} blueprints in {seconds:.0f} s, {per_hour:.0f} an hour, "
          f"{sum(k.status is KernelStatus.VALIDATED for k in kernels)} validated")
    for name, mean in stages.items():
        print(f"  {name}: {mean:.1f} s")
    benchmark.extra_info.update(
        target="none; seconds a blueprint are in bench_compile", blueprints=len(work),
        seconds=seconds, per_hour=per_hour, stages=stages, untimed=True)
    benchmark.pedantic(lambda: None, rounds=1)
