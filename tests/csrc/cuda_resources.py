"""What the CUDA kernels use of a device, as ptxas says: the table csrc/cuda/resources.json.

`python -m tests.csrc.cuda_resources` writes it anew (also: `make cuda-resources`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "csrc/cuda/resources.json"
ARCHS = ("80", "90", "100")
# The element types of the AT_DISPATCH in csrc/cuda/blend.cu; each launch has its two widths.
TYPES = ("float", "double", "c10::BFloat16", "c10::Half")
INSTANCES = """
template void esper::device::LaunchLerp<{t}, cudaStream_t>(
    {t}*, const {t}*, const {t}*, double, int64_t, int, cudaStream_t);
template void esper::device::LaunchSplit<{t}, cudaStream_t>(
    {t}*, {t}*, const {t}*, double, int64_t, int, cudaStream_t);
"""
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    """For example "13.0.88"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    assert found is not None, said
    return found[1]


def known_archs(nvcc: str) -> list[str]:
    said = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    return [arch for arch in ARCHS if f"compute_{arch}\n" in said]


def measure(nvcc: str) -> dict[str, Any]:
    """Compile every instance of every kernel for every architecture that `nvcc` knows.

    Returns {"nvcc": version, "kernels": {name: {arch: {registers, shared_bytes, stack_bytes,
    spill_store_bytes, spill_load_bytes}}}}. Takes about 10 s of processor time.
    """
    spec = find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    include = Path(spec.submodule_search_locations[0]) / "include"
    header = ROOT / "csrc/cuda/blend_device.h"
    source = f'#include "{header}"\n' + "".join(INSTANCES.format(t=t) for t in TYPES)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known_archs(nvcc)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "instances.cu")
        file.write_text(source)
        done = subprocess.run(
            [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=20012",
             "-isystem", str(include), *targets, "-Xptxas=-v", "-c", str(file),
             "-o", str(Path(folder, "instances.o"))],
            capture_output=True, text=True, check=False,
        )
    assert done.returncode == 0, done.stderr
    entries = list(ENTRY.finditer(done.stderr))
    plain = subprocess.run(
        ["c++filt"], input="\n".join(e["name"] for e in entries), capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for entry, full in zip(entries, plain, strict=True):
        name = re.search(r"esper::device::(\w+<[^>]*>)\(", full)
        assert name is not None, full
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.setdefault(name[1], {})[f"sm_{entry['arch']}"] = {
            "registers": int(entry["registers"]),
            # ptxas leaves out what is not used.
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(entry["stack"]),
            "spill_store_bytes": int(entry["stores"]),
            "spill_load_bytes": int(entry["loads"]),
        }
    return {"nvcc": nvcc_version(nvcc), "kernels": dict(sorted(kernels.items()))}


def to_text(table: dict[str, Any]) -> str:
    """JSON with one line for each kernel and architecture."""
    rows = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(arch)}: {json.dumps(use)}" for arch, use in archs.items())
        + "\n  }"
        for name, archs in table["kernels"].items()
    ]
    body = ",\n".join(rows)
    return f'{{\n "nvcc": {json.dumps(table["nvcc"])},\n "kernels": {{\n{body}\n }}\n}}\n'


if __name__ == "__main__":
    compiler = find_nvcc()
    if compiler is None:
        sys.exit("no nvcc in CUDA_HOME or PATH; the table is left as it was")
    TABLE.write_text(to_text(measure(compiler)))
    print(f"wrote {TABLE.relative_to(ROOT)}")
