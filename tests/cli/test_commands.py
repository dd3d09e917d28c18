"""The command line as its users meet it: in a process of its own, on a real library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import esper
from esper.leyline.library import KernelRecord
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import (
    Hardware,
    Measurement,
    ProofCase,
    SpeedVerdict,
    Tag,
    ValidationReport,
)
from esper.urza.library import LocalLibrary
from tests.artifacts import members, pack
from tests.nissa.runs import write_run
from tests.support import bottleneck

FEATURES = SiteSignature(kind=SiteKind.FEATURES, channels=16)
MAP = SiteSignature(kind=SiteKind.MAP, channels=8)


def esper_command(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "esper.cli.main", *arguments], cwd=cwd,
                          capture_output=True, text=True, timeout=240, check=False,
                          env=_environment() | environment)


def _environment() -> dict[str, str]:
    import os

    root = str(Path(esper.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "100"}


def _finish(library: LocalLibrary, signature: SiteSignature, accepted: bool) -> KernelRecord:
    ir = bottleneck(signature.kind)
    library.submit(ir, signature, author="karn")
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    code = {"forward.so": b"forward", "backward.so": b"backward"}
    library.complete_blueprint(claim, pack(members(ir, signature, code).items()))
    kernel = library.claim_kernel("urabrask", 60)
    assert kernel is not None
    measured = Measurement(batch=16, space=8, speedup=1.5, low=1.41, high=1.6,
                           verdict=SpeedVerdict.FAST, kernel_seconds=(2e-5, 2.1e-5),
                           eager_seconds=(3e-5, 3.1e-5))
    case = ProofCase(name="odd", batch=7, space=5, worst_ratio=41.0, passed=accepted,
                     detail="gradient of up.weight")
    return library.complete_kernel(kernel, ValidationReport(
        kernel_id=kernel.record.kernel_id, accepted=accepted, proof=(case,), seconds=1.0,
        reason="" if accepted else "odd: 41 times eager's error",
        measurements=(measured,) if accepted else (),
        tags=(Tag(name="fast", evidence="batch 16", value=1.5),) if accepted else (),
        hardware=Hardware(cpu="A Processor 9000", isa="AVX2", cores=2, threads=1)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KernelRecord, KernelRecord]:
    folder = tmp_path_factory.mktemp("library")
    held = LocalLibrary(folder)
    good, bad = _finish(held, FEATURES, True), _finish(held, MAP, False)
    held.submit(bottleneck(SiteKind.TOKENS), SiteSignature(kind=SiteKind.TOKENS, channels=32),
                author="karn")
    held.close()
    return folder, good, bad


Held = tuple[Path, KernelRecord, KernelRecord]


def test_version() -> None:
    done = esper_command("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"esper {esper.__version__}\n")
    assert all(word in done.stdout for word in ("torch", "cuda", "compiler", "isa", "extension"))


def test_doctor_looks_at_this_machine() -> None:
    done = esper_command("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and esper.__version__ in done.stdout


def test_what_is_light_stays_light() -> None:
    """Neither `import esper` nor the parsing of a command line pays for torch or grpc."""
    code = ("import sys, esper, esper.rpc.address, esper.cli.main as m; m.parser(); "
            "print([n for n in ('torch', 'grpc', 'google.protobuf', 'rich') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
                          check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def test_help_says_the_exit_codes() -> None:
    done = esper_command("--help")
    assert done.returncode == 0 and "exit codes:" in done.stdout and "130" in done.stdout


def test_ls_lists_kernels_in_full(library: Held) -> None:
    folder, good, bad = library
    done = esper_command("library", "ls", "--library", str(folder))
    assert done.returncode == 0, done.stderr
    for part in (good.kernel_id[:14], bad.kernel_id[:14], "VALIDATED", "REJECTED", "1.50",
                 "features[16] float32 cpu", "bottleneck", "2 kernels"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("filters", "good_there", "bad_there"),
    [
        (["--status", "VALIDATED"], True, False),
        (["--tag", "fast"], True, False),
        (["--tag", "small"], False, False),
        (["--signature", "map"], False, True),
        (["--signature", "features[16] float32"], True, False),
        (["--signature", MAP.id[:12]], False, True),
        (["--signature", "features", "--status", "REJECTED"], False, False),
    ],
)
def test_ls_filters(
    library: Held, filters: list[str], good_there: bool, bad_there: bool
) -> None:
    folder, good, bad = library
    done = esper_command("library", "ls", "--library", str(folder), *filters)
    assert done.returncode == 0, done.stderr
    assert (good.kernel_id[:14] in done.stdout) is good_there
    assert (bad.kernel_id[:14] in done.stdout) is bad_there
    assert ("no kernel matches" in done.stdout) is not (good_there or bad_there)


def test_ls_lists_blueprints_too(library: Held) -> None:
    done = esper_command("library", "ls", "--library", str(library[0]), "--status", "UNVALIDATED")
    assert "tokens[32]" in done.stdout and "map[8]" not in done.stdout


def test_show_tells_all_of_a_kernel(library: Held) -> None:
    folder, good, bad = library
    done = esper_command("library", "show", good.kernel_id[:10], "--library", str(folder))
    for part in (good.kernel_id, good.digest, "accepted", "1.500", "1.410 to 1.600", "20.5 us",
                 "fast 1.5: batch 16", "A Processor 9000", "down = linear(h, out=C/2)",
                 "return sum"):
        assert part in done.stdout, (part, done.stdout, done.stderr)
    refused = esper_command("library", "show", bad.kernel_id, "--library", str(folder)).stdout
    assert "refused: odd: 41 times" in refused and "failed: odd, batch 7" in refused
    as_json = esper_command("library", "show", good.kernel_id, "--json", "--library", str(folder))
    assert KernelRecord.model_validate(json.loads(as_json.stdout)) == good


def test_what_is_not_there_is_one_message_and_exit_2(library: Held, tmp_path: Path) -> None:
    for arguments, part in (
        (["library", "show", "k-nothing", "--library", str(library[0])], "no kernel or blueprint"),
        (["library", "show", "k-", "--library", str(library[0])], "start of 2 kernel ids"),
        (["library", "ls", "--library", str(tmp_path)], "there is no library in"),
        (["report", str(tmp_path)], "not a run folder"),
        (["train", str(tmp_path / "gone.yaml")], "gone.yaml"),
    ):
        done = esper_command(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done
        assert done.stderr.startswith("esper: ") and part in done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # looking made nothing


def test_wrong_usage_is_exit_2() -> None:
    assert esper_command("grow").returncode == 2
    assert esper_command("library", "ls", "--status", "FINE").returncode == 2


def test_a_run_without_a_compiler_says_so_and_does_not_wait(tmp_path: Path) -> None:
    examples = Path(esper.__file__).parents[1] / "examples"
    (tmp_path / "run.yaml").write_text(
        "name: tiny\ncompare: false\n"
        f"model: {{factory: '{examples / 'hosts.py'}:DigitsCNN', arguments: {{width: 4}}}}\n"
        "data: {name: digits, limit: 64, eval_limit: 32}\ntrain: {epochs: 1}\n"
        "slow_track: {wait_seconds: 600}\n")
    # A terminal's width must not cut the message in two.
    done = esper_command("train", "run.yaml", cwd=tmp_path, CXX="no-such-compiler", COLUMNS="400")
    assert done.returncode == 0, done.stderr
    assert "none can be compiled here: no C++ compiler: 'no-such-compiler'" in done.stdout
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_report_writes_and_names_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    done = esper_command("report", str(folder))
    assert done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size > 10_000
