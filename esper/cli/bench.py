"""`esper bench`: prove kernels, measure them at length, and write a page and a JSON file."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from esper.cli.places import existing_library
from esper.errors import ArtifactError, NotInLibrary
from esper.leyline.artifact import Manifest
from esper.leyline.library import Library
from esper.leyline.verdict import ValidationReport

# A shape takes some twenty seconds to compile by torch.compile, and a busy machine is slow.
DEADLINE_SECONDS = 900.0


@dataclass(frozen=True)
class Benchmark:
    """What `bench` found, and where it wrote it."""

    reports: tuple[ValidationReport, ...]
    page: Path
    data: Path


@dataclass(frozen=True)
class _Target:
    path: Path
    digest: str
    manifest: Manifest
    name: str


def bench(
    kernels: Sequence[str | Path],
    *,
    library: str | Path = "library",
    folder: str | Path = "bench",
    thorough: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Prove and measure `kernels`, and write `bench.html` and `bench.json` into `folder`.

    A kernel is the path of an artifact, or an id in `library` or the start of one. Nothing is
    written to the library. Takes one to three minutes a kernel where `thorough`, which
    measures torch.compile too and more batch sizes, else some ten seconds.

    Args:
        tell: is given a line for people as each kernel begins and ends.

    Raises:
        NotInLibrary: there is no such file, id or library.
        ArtifactCorrupt: a file is no artifact.
    """
    from esper.nissa.bench_page import Entry, write_page
    from esper.urabrask.plan import QUICK, THOROUGH
    from esper.urabrask.reports import to_benchmark_json
    from esper.urabrask.service import Limits, examine_file
    from esper.urabrask.standing import Standing

    shelf = _library_of(library)
    targets = [_target(shelf, library, wanted) for wanted in kernels]
    standing = None if shelf is None else Standing(shelf)
    limits = Limits(deadline_seconds=DEADLINE_SECONDS, plan=THOROUGH if thorough else QUICK)
    entries = []
    for number, t in enumerate(targets, 1):
        tell(f"{number} of {len(targets)}: {t.name}, {t.manifest.signature}, "
             f"{t.manifest.kernel_id[:14]} ...")
        report = examine_file(t.path, t.manifest.kernel_id, t.digest, limits)
        assert report is not None  # nobody was told to give up
        if report.accepted:
            report = _placed(standing, t.manifest, report)
        tell(f"    {_words(report)}")
        entries.append(Entry(t.name, t.manifest, report))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    reports = tuple(e.report for e in entries)
    data = target / "bench.json"
    data.write_text(json.dumps(to_benchmark_json(reports), indent=1) + "\n")
    page = write_page(target / "bench.html", entries, versions=_versions(),
                      calibration=None if standing is None else standing.model.calibration)
    return Benchmark(reports, page, data)


def _library_of(folder: str | Path) -> Library | None:
    try:
        return existing_library(str(folder))
    except NotInLibrary:
        return None  # artifacts given by path need none


def _target(library: Library | None, folder: str | Path, wanted: str | Path) -> _Target:
    path = Path(wanted)
    if path.is_file():
        return _read(path)
    if library is None:
        existing_library(str(folder))  # says what is missing
    assert library is not None
    found = [k for k in library.kernels() if k.kernel_id.startswith(str(wanted))]
    if len(found) != 1:
        raise NotInLibrary(
            f"{str(wanted)!r} is no file, and the start of {len(found)} kernel ids in the library "
            f"in {folder}; give one of those that `esper library ls` shows"
        )
    (record,) = found
    names = {b.blueprint_id: b.ir.name for b in library.blueprints()}
    return _Target(library.fetch(record.digest), record.digest, record.manifest,
                   names.get(record.blueprint_id) or record.blueprint_id[:14])


def _read(path: Path) -> _Target:
    from esper.kasmina.artifact import MAX_ARTIFACT_BYTES, read_artifact

    if (size := path.stat().st_size) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"{path}: {size} bytes, an artifact has at most {MAX_ARTIFACT_BYTES}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    artifact = read_artifact(path, digest)
    return _Target(path, digest, artifact.manifest, artifact.ir.name or path.stem)


def _placed(
    standing: object, manifest: Manifest, report: ValidationReport
) -> ValidationReport:
    from esper.urabrask.risk import RULES
    from esper.urabrask.standing import Standing
    from esper.urabrask.tags import tags

    if isinstance(standing, Standing):
        return standing.place(manifest, report)
    return report.model_copy(
        update={"tags": tags(manifest, report), "risk": RULES.score((manifest, report))}
    )


def _words(report: ValidationReport) -> str:
    if not report.accepted:
        return f"refused: {report.reason}"
    words = f"{report.speedup:.2f} times as fast as eager"
    if (over := report.speedup_over_compile) is not None:
        words += f", {over:.2f} times as fast as torch.compile"
    tags = ", ".join(t.name for t in report.tags) or "no tags"
    return f"{words}; {tags}; {report.seconds:.0f} s"


def _versions() -> dict[str, str]:
    import torch

    import esper

    return {"esper": esper.__version__, "torch": torch.__version__,
            "python": platform.python_version()}


def self_test(console: Console, runs: int) -> int:
    """Print the bench's own error rate here and now; 1 where it is above 5 %."""
    import torch

    from esper.urabrask import bench as urabrask

    torch.set_num_threads(1)  # as kernels are measured
    found = urabrask.self_test(runs)
    console.print(
        f"{found.false_fast} of {found.runs} comparisons of one thing with itself came out FAST, "
        f"{found.false_slow} SLOW; with 95 % confidence fewer than {found.at_most:.1%} are false "
        f"FAST (target 5 %); the widest interval was {found.widest:.3f}", highlight=False)
    return int(found.false_fast_rate > 0.05)
