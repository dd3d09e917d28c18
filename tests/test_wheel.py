"""The wheel: built beside the torch that is here, installed where nothing else is, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from esper.kasmina import native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

_SMOKE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import esper, torch
from torch import nn
assert Path(esper.__file__).is_relative_to(sys.prefix), esper.__file__
from esper.kasmina import native
extension = native.extension()
assert Path(extension.__file__).is_relative_to(sys.prefix), extension.__file__
from esper.kasmina.blend import blend
h, s = torch.randn(5), torch.randn(5)
torch.testing.assert_close(blend(h, s, 0.5), torch.lerp(h, s, 0.5))
from esper.kasmina.cache import kernel_cache
assert kernel_cache().statistics()["resident_count"] == 0
from esper.triton_kernels import __name__ as there
from esper.nissa.report import __name__ as and_its_templates
model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), sites=["1"],
                   example=torch.randn(2, 4))
assert model(torch.randn(2, 4)).shape == (2, 2)
"""

_FALLS_BACK = """
import sys, warnings
import torch
from esper.kasmina import native
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert native.extension() is None
    assert native.extension() is None
assert len(said) == 1 and said[0].category is RuntimeWarning, [str(w.message) for w in said]
print(said[0].message)
from esper.kasmina.blend import blend
h, s = torch.randn(5), torch.randn(5)
torch.testing.assert_close(blend(h, s, 0.5), torch.lerp(h, s, 0.5))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources by themselves: what is built in the checkout must not be mistaken for them."""
    target = tmp_path_factory.mktemp("source") / "esper"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )
    files = listed.stdout.split("\n") if listed.returncode == 0 else []
    if not any(files):  # an unpacked archive, not a checkout
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(
            ".venv*", "build", "*.so", "_C.*.json", "*.egg-info", "__pycache__"))
        return target
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, target / file)
    return target


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed, started with no trace of this checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", native.DISABLE)}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**env, **environment}, capture_output=True,
        text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel in it, and the torch that is here."""
    if native.library_path() is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    wheels = tmp_path_factory.mktemp("wheels")
    # Without isolation: no second torch, and no network.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", wheels, cwd=source,
        ESPER_CUDA="0")
    (wheel,) = wheels.glob("esper-*.whl")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-{version}-{version}-{machine}.whl")
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                        cwd=wheels).strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile",
        "--target", packages, wheel, cwd=wheels)
    # torch and the other dependencies are those of this environment, behind the new one's own.
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    run(installed, "-c", _SMOKE, cwd=tmp_path)
    script = "import sys; from esper.cli.main import main; sys.exit(main(['doctor']))"
    assert re.search(r"ok +extension", run(installed, "-c", script, cwd=tmp_path))


@pytest.fixture
def package(installed: Path, tmp_path: Path) -> Path:
    """A copy of the installed package, to be doctored; PYTHONPATH is its parent."""
    code = "import esper, pathlib; print(pathlib.Path(esper.__file__).parent)"
    origin = Path(run(installed, "-c", code, cwd=tmp_path).strip())
    return shutil.copytree(origin, tmp_path / "doctored" / "esper")


def test_an_extension_for_another_torch_is_never_opened(
    installed: Path, package: Path, tmp_path: Path
) -> None:
    (paper,) = package.glob("_C.*.json")
    built = json.loads(paper.read_text())
    paper.write_text(json.dumps({**built, "torch": "2.0.1+cpu"}))
    said = run(installed, "-c", _FALLS_BACK, cwd=tmp_path, PYTHONPATH=str(package.parent))
    assert "built for torch 2.0.1+cpu" in said and f"found here: torch {built['torch']}" in said
    assert "pip install" in said


def test_an_extension_that_torch_lacks_a_symbol_for_is_done_without(
    installed: Path, package: Path, tmp_path: Path
) -> None:
    """Its paper is right and its inside is not: the dynamic linker finds out."""
    (library,) = package.glob("_C.*.so")
    code = library.read_bytes()
    symbol = b"_ZN3c106Device"  # c10::Device's, of whatever function
    names = re.findall(rb"\x00(" + symbol + rb"\w+|_ZN5torch8autograd\w+|_ZN2at\w+)\x00", code)
    assert names, "the extension needs nothing of torch: the test has lost its subject"
    wrong = code
    for name in set(names):
        wrong = wrong.replace(b"\x00" + name + b"\x00", b"\x00" + name[:-1] + b"?\x00")
    library.write_bytes(wrong)
    said = run(installed, "-c", _FALLS_BACK, cwd=tmp_path, PYTHONPATH=str(package.parent))
    assert "could not be loaded" in said and "pip install" in said
