"""The doctor answers on every machine, above all on one where something is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from esper import __version__, doctor
from esper.doctor import Check
from esper.kasmina import native

ROOT = Path(__file__).resolve().parent.parent


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name.startswith(name))


def test_everything_is_looked_at() -> None:
    checks = doctor.collect()
    assert [check.name for check in checks] == [
        "python", "torch", "cuda", "nvcc", "compiler", "isa", "extension", "triton",
        "grpc", "idle priority", "sandbox", "cores",
    ]
    assert sys.executable in find(checks, "python").found
    assert find(checks, "torch").ok
    assert all(check.hint for check in checks if check.ok is False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checks[0].ok = False  # type: ignore[misc]


def test_the_oldest_torch_is_the_one_that_pip_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={'.'.join(map(str, doctor.MIN_TORCH))}" in project["dependencies"]


@pytest.mark.skipif(os.environ.get(native.DISABLE, "0") not in ("", "0"),
                    reason=f"turned off by {native.DISABLE}")
def test_the_extension_is_here() -> None:
    """Its own tests are skipped where it is not, which must not look like passing."""
    assert native.extension() is not None, doctor.render()


def test_hints_come_below() -> None:
    text = doctor.render([
        Check("one", "fine", True),
        Check("second", "gone", False, "bring it back"),
        Check("third", "not here", None),
    ])
    assert text.splitlines() == [
        f"esper {__version__}",
        "  ok  one     fine",
        "  !!  second  gone",
        "  --  third   not here",
        "",
        "What to do:",
        "  second: bring it back",
    ]
    assert doctor.render([]) == f"esper {__version__}"


def child(program: str, **env: str) -> list[Check]:
    """What a fresh process with `program` run first collects."""
    code = (
        f"{program}\n"
        "import dataclasses, json\n"
        "from esper.doctor import collect, render\n"
        "render()\n"
        "print(json.dumps([dataclasses.asdict(c) for c in collect()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [Check(**one) for one in json.loads(done.stdout)]


def test_answers_without_torch() -> None:
    checks = child("import sys; sys.modules['torch'] = None")
    assert find(checks, "torch").ok is False
    assert "install torch" in find(checks, "torch").hint
    assert find(checks, "cuda").ok is None
    assert find(checks, "extension").ok is not True


def test_answers_with_a_torch_that_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libtorch.so: gone')")
    check = find(child(f"import sys; sys.path.insert(0, {str(tmp_path)!r})"), "torch")
    assert check.ok is False
    assert "libtorch.so: gone" in check.found


def test_answers_without_grpc() -> None:
    check = find(child("import sys; sys.modules['grpc'] = None"), "grpc")
    assert check.ok is False and "grpcio" in check.hint


def test_a_tool_that_is_not_there(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CXX": "g++"}
    checks = child("", **environment)
    assert find(checks, "nvcc").found == "not found"
    assert find(checks, "compiler").ok is False


def test_a_compiler_that_fails_is_not_found(tmp_path: Path) -> None:
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    checks = child("", CXX=str(program))
    assert find(checks, "compiler").ok is False


needs_extension = pytest.mark.skipif(
    native.library_path() is None, reason="the extension is not built here"
)


@needs_extension
def test_says_that_the_extension_is_turned_off() -> None:
    check = find(child("", **{native.DISABLE: "1"}), "extension")
    assert not check.ok
    assert native.DISABLE in check.found and native.DISABLE in check.hint


@needs_extension
def test_tells_what_a_foreign_extension_was_built_for() -> None:
    checks = child(
        "import dataclasses\n"
        "from esper.kasmina import native\n"
        "read = native.read_build_info\n"
        "native.read_build_info = lambda p: dataclasses.replace(read(p), torch='1.0.0')"
    )
    check = find(checks, "extension")
    assert not check.ok
    assert "torch 1.0.0" in check.found and "pip install" in check.hint


def test_a_machine_without_an_extension_is_told_how_to_build_it() -> None:
    check = find(
        child("from esper.kasmina import native\nnative.library_path = lambda: None"), "extension"
    )
    assert not check.ok
    assert "not built" in check.found and "pip install" in check.hint


def test_import_is_light() -> None:
    code = "import sys, esper.doctor; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    )
    assert done.stdout.strip() == "False"
