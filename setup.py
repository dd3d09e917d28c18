"""Builds esper, and with it esper._C where a torch and a C++ compiler are at hand.

Environment:
  ESPER_TORCH          folder that contains `torch/`, where it cannot be found otherwise
  ESPER_BUILD_NATIVE   0 builds pure Python
  ESPER_CUDA           0 leaves the CUDA sources out
  ESPER_CUDA_ARCHS     for example "80;90"; default: those of 80, 90 and 100 that nvcc knows
  ESPER_SANITIZE       for example "address,undefined": an extension for scripts/sanitize
  MAX_JOBS             compilers at a time
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def say(line: str) -> None:
    print(f"esper: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Torch:
    """A torch installation, read from its files; importing it could fail and takes seconds."""

    folder: Path
    version: str
    cuda: str | None
    cxx11_abi: str


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    archs: tuple[str, ...]
    includes: tuple[Path, ...]
    runtime: Path


def site_folders() -> list[Path]:
    """Where torch may be, nearest first.

    pip's build isolation hides site-packages from sys.path and keeps sys.executable, so
    sysconfig still knows the environment that is built for. A venv made with
    --system-site-packages has torch in the base installation.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    found = [os.environ.get("ESPER_TORCH"), *sys.path]
    for kind in ("purelib", "platlib"):
        found += [sysconfig.get_path(kind), sysconfig.get_path(kind, vars=base)]
    found.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(found) if folder]


def find_torch() -> Torch | None:
    for folder in site_folders():
        root = folder / "torch"
        if not ((root / "version.py").is_file() and (root / "lib/libtorch_python.so").is_file()):
            continue
        source = (root / "version.py").read_text()
        version = re.search(r"^__version__ = ['\"](.+?)['\"]", source, re.M)
        cuda = re.search(r"^cuda[^=\n]*= ['\"](.+?)['\"]", source, re.M)
        if version is None:
            continue
        cmake = root / "share/cmake/Torch/TorchConfig.cmake"
        config = cmake.read_text() if cmake.is_file() else ""
        abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config)
        return Torch(root, version[1], cuda and cuda[1], abi[1] if abi else "1")
    return None


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def runtime_version(folder: Path) -> str | None:
    """CUDA version, "13.0" say, of the runtime headers in `folder`."""
    header = folder / "cuda_runtime_api.h"
    found = re.search(r"CUDART_VERSION\s+(\d+)", header.read_text()) if header.exists() else None
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None


def find_cuda(torch: Torch) -> Cuda | None:
    """What is needed to build the CUDA sources, or None after one line that says why not."""
    if torch.cuda is None or os.environ.get("ESPER_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        say(f"torch is built for CUDA {torch.cuda}, no nvcc found; CUDA sources are left out")
        return None
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if version is None or version[1].split(".")[0] != torch.cuda.split(".")[0]:
        say(f"torch is built for CUDA {torch.cuda}, nvcc is {version[1] if version else 'unknown'}"
            "; CUDA sources are left out")
        return None
    # torch's CUDA headers include those of cusparse and others; where torch comes from wheels
    # they are in the nvidia wheels beside it, wherever the toolkit is.
    roots = [*sorted(torch.folder.parent.glob("nvidia/*")), Path(home)]
    folders = [root / "include" for root in roots if (root / "include").is_dir()]
    # Runtime headers of nvcc's own version come first: those of another minor are refused by
    # the toolkit's. What the toolkit lacks is found in the wheels after it.
    includes = tuple(sorted(folders, key=lambda f: runtime_version(f) != version[1]))
    libraries = [root / lib for root in roots for lib in ("lib", "lib64")]
    runtimes = [file for lib in libraries for file in sorted(lib.glob("libcudart.so*"))]
    if not runtimes or not any((folder / "cuda_runtime.h").is_file() for folder in includes):
        say("no CUDA runtime library or headers beside torch or in CUDA_HOME; CUDA sources are "
            "left out")
        return None
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    wanted = os.environ.get("ESPER_CUDA_ARCHS")
    archs = wanted.split(";") if wanted else [a for a in ("80", "90", "100") if a in known]
    return Cuda(nvcc, version[1], tuple(archs), includes, runtimes[0])


def isa() -> list[str]:
    """Instruction sets the vectorised sources are built for, as /proc/cpuinfo calls them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = re.search(r"^flags\s*:(.*)$", text, re.M)
    here = set(flags[1].split()) if flags else set()
    # Wider ones are compiled beside these and chosen when they run.
    return ["avx2", "fma", "f16c"] if {"avx2", "fma", "f16c"} <= here else []


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = find_torch()
        assert torch is not None  # else there would be no extension, see main()
        cuda, sets = find_cuda(torch), isa()
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        flags = [f"-m{name}" for name in sets]
        if sets:
            flags += ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": compiler,
            "ESPER_OUTPUT": target,
            "ESPER_TORCH_DIR": torch.folder,
            "ESPER_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "ESPER_CXX11_ABI": torch.cxx11_abi,
            "ESPER_ISA_FLAGS": ";".join(flags),
            "ESPER_SANITIZE": os.environ.get("ESPER_SANITIZE", ""),
            "ESPER_NVCC": cuda.nvcc if cuda else "",
            "ESPER_CUDA_ARCHS": ";".join(cuda.archs) if cuda else "",
            "ESPER_CUDA_INCLUDE": ";".join(map(str, cuda.includes)) if cuda else "",
            "ESPER_CUDART": cuda.runtime if cuda else "",
        }
        # In the tree, for an editable install's own build folder is gone after each build.
        kind = "-sanitize" if os.environ.get("ESPER_SANITIZE") else ""
        build = HERE / "build" / f"cmake-{sys.implementation.cache_tag}{kind}"
        # Settings of another torch or another generator must not survive in the cache.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        if generator and (build / "Makefile").exists():
            shutil.rmtree(build)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        say(f"building esper._C for torch {torch.version}, CUDA sources "
            + (f"for sm_{', sm_'.join(cuda.archs)}" if cuda else "left out"))
        subprocess.run(["cmake", "-S", str(HERE), "-B", str(build), *generator,
                        *(f"-D{name}={value}" for name, value in settings.items())], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        info = {
            "torch": torch.version,
            "torch_cuda": torch.cuda,
            "python": sys.implementation.cache_tag,
            "machine": platform.machine(),
            "compiler": output_of(str(compiler), "--version").splitlines()[0],
            "isa": sets,
            "cuda": cuda.version if cuda else None,
            "archs": [f"sm_{arch}" for arch in cuda.archs] if cuda else [],
        }
        target.with_suffix(".json").write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs load the library from the source tree; its paper goes with it."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            # Not get_ext_fullpath: at this point setuptools has it name the source tree.
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).with_suffix(".json")
            shutil.copyfile(built, HERE / "esper" / built.name)


def native() -> list[Extension]:
    if os.environ.get("ESPER_BUILD_NATIVE") == "0":
        say("ESPER_BUILD_NATIVE=0, building pure Python")
        return []
    missing = []
    if sys.platform != "linux":
        missing.append("Linux")
    elif find_torch() is None:
        missing.append("torch (install it first, or set ESPER_TORCH to the folder that holds it)")
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")):
        missing.append("a C++ compiler")
    if not shutil.which("cmake"):
        missing.append("cmake")
    if missing:
        say(f"building pure Python, without {' and '.join(missing)}: esper works, its calls into "
            "kernels are slower")
        return []
    return [Extension("esper._C", sources=[])]


setup(
    packages=[*find_packages(include=["esper", "esper.*"]), "esper.triton_kernels"],
    package_dir={"esper.triton_kernels": "triton_kernels"},
    ext_modules=native(),
    cmdclass={"build_ext": CMakeBuild},
)
