"""Compiled kernels that cheat, through the loader and the processes of every kernel.

`test_proof` has more cheats, in Python and in one process; these are machine code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from esper.leyline.artifact import MANIFEST, Manifest
from esper.leyline.base import sha256
from esper.leyline.verdict import ValidationReport
from esper.urabrask.plan import Plan
from esper.urabrask.service import Limits, examine_file
from tests.artifacts import pack
from tests.urabrask.dishonest import tampered

pytestmark = pytest.mark.slow

CODE = ("forward.so", "backward.so")


def _examined(honest: Path, cheat: str, folder: Path) -> ValidationReport:
    with zipfile.ZipFile(honest) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    code = tampered({name: parts[name] for name in CODE}, cheat, folder)
    manifest = Manifest.model_validate_json(parts[MANIFEST])
    sums = {**manifest.sha256, **{name: sha256(code[name]) for name in CODE}}
    parts |= code
    parts[MANIFEST] = manifest.model_copy(update={"sha256": sums}).model_dump_json().encode()
    content = pack(parts.items())
    path = folder / "kernel.esper"
    path.write_bytes(content)
    limits = Limits(plan=Plan(seconds=0.3))
    report = examine_file(path, manifest.kernel_id, sha256(content), limits)
    assert report is not None
    return report


def test_the_honest_half_behind_the_same_shim_is_accepted(
    feature_artifact: Path, tmp_path: Path
) -> None:
    report = _examined(feature_artifact, "honest", tmp_path)
    assert report.accepted, report.reason


@pytest.mark.parametrize(
    ("cheat", "says"),
    [
        ("returns its last result", "no output reused: an output is reused: two calls"),
        ("mutates its input", "inputs untouched: the kernel writes to its input: h changed"),
        ("skips the backward", "gradient of"),
        ("spins a thread", "nothing left behind: the kernel leaves"),
        ("patches the clock", "cannot be believed: the clock disagrees with the system's"),
        ("depends on uninitialised memory", "depends on uninitialised memory"),
        ("wrong only at odd sizes", "batch 7, space 8, alpha 1, FULL: output: error"),
    ],
)
def test_a_compiled_cheat_is_refused(
    feature_artifact: Path, tmp_path: Path, cheat: str, says: str
) -> None:
    report = _examined(feature_artifact, cheat, tmp_path)
    assert not report.accepted
    assert says in report.reason, report.reason
