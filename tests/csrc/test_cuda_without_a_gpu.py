"""What can be known of the CUDA kernels without a GPU: arithmetic, indices, resources, linking."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from esper.kasmina import native
from tests.csrc import cuda_resources

NVCC = cuda_resources.find_nvcc()
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


def test_every_kernel_on_the_host(tmp_path: Path) -> None:
    """All kernels, types, odd sizes and misalignments, in place and not, against float64."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "a C++ compiler is needed, as for the extension itself"
    program = tmp_path / "blend_device_test"
    # The sanitizers see what a wrong index or a misaligned pack would do.
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror",
         "-isystem", str(TORCH / "include"), str(HERE / "blend_device_test.cc"),
         "-o", str(program)],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = int(done.stdout.split()[0])
    assert cases >= 3000 and "0 wrong" in done.stdout


@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or PATH: nothing to ask ptxas with")
def test_resources_are_those_of_the_table() -> None:
    assert NVCC is not None
    table = json.loads(cuda_resources.TABLE.read_text())
    found = cuda_resources.measure(NVCC)
    assert found["kernels"].keys() == table["kernels"].keys()
    for name, archs in found["kernels"].items():
        for arch, use in archs.items():
            assert use["spill_store_bytes"] == use["spill_load_bytes"] == 0, (name, arch)
            assert use["stack_bytes"] == 0, (name, arch)
    if found["nvcc"] != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {found['nvcc']}: nothing "
                    "spills, and registers of two compilers cannot be compared")
    assert found == table, "kernels have changed: run `make cuda-resources`, look, commit"


def test_the_table_is_complete() -> None:
    """Read everywhere, also where there is no nvcc."""
    kernels = json.loads(cuda_resources.TABLE.read_text())["kernels"]
    assert len(kernels) == 2 * 2 * len(cuda_resources.TYPES)  # kernels, widths
    for archs in kernels.values():
        assert set(archs) == {f"sm_{arch}" for arch in cuda_resources.ARCHS}


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_the_extension_is_linked_with_cuda() -> None:
    """Against a CUDA build of torch and with nvcc at hand, the CUDA sources are in."""
    extension = native.extension()
    if extension is None or NVCC is None:
        pytest.skip("the extension or nvcc is missing here (see `esper doctor`)")
    library = native.library_path()
    assert library is not None
    info = native.read_build_info(library)
    assert info is not None and info.archs
    assert extension.with_cuda  # opened, so every symbol of the CUDA objects was found
