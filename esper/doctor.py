"""What this machine and this installation have and lack, and what to do about it.

Works without torch; what needs torch is then said to be missing. `esper doctor` prints it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.errors import EsperError
from esper.kasmina import native
from esper.sandbox.probe import available, describe
from esper.version import __version__

MIN_TORCH = (2, 13)  # as in pyproject.toml
INSTALL_TORCH = f"install torch {'.'.join(map(str, MIN_TORCH))} or later, then esper again"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    `ok` is None where nothing is wrong and nothing is there either: a machine without a GPU is
    not a broken one. `hint` says what to do; it is empty where there is nothing to do.
    """

    name: str
    found: str
    ok: bool | None
    hint: str = ""


def _first_line(*command: str) -> str | None:
    """First line of what a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None


def _python() -> Check:
    # No check of the version: pip refuses to install esper on a Python that is too old.
    return Check("python", f"{platform.python_version()} ({sys.executable})", True)


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: torch is there, its libraries are not
        missing = importlib.util.find_spec("torch") is None
        found = "not installed" if missing else f"cannot be imported: {e}"
        return Check("torch", found, False, INSTALL_TORCH)
    version = str(torch.__version__)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MIN_TORCH:
        return Check("torch", version, False, INSTALL_TORCH)
    return Check("torch", f"{version}, {torch.get_num_threads()} threads", True)


def _cuda() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("cuda", "not known without torch", None)
    if torch.version.cuda is None:
        return Check("cuda", "torch is built for CPU only", None)
    built = f"torch is built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return Check("cuda", f"{built}; no device is seen", None)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("cuda", f"{built}; {', '.join(names)}", True)


def _nvcc() -> Check:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if path is None:
        return Check("nvcc", "not found", None)
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return Check("nvcc", f"{path} does not run: {e}", False, "repair the CUDA toolkit")
    release = re.search(r"release ([\d.]+)", text)
    return Check("nvcc", f"{release[1] if release else 'unknown version'} ({path})", True)


def _compiler() -> Check:
    # Inductor takes $CXX, then g++; so does esper's own build.
    name = os.environ.get("CXX", "g++")
    line = _first_line(name, "--version")
    if line is not None:
        return Check("compiler", line, True)
    return Check(
        "compiler", f"{name} not found", False,
        "install g++: without it no kernel can be compiled on this machine",
    )


def _isa() -> Check:
    flags = native.cpu_flags()
    if flags is None:
        return Check("isa", f"{platform.machine()}, instruction sets not known", None)
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
    found = " ".join(name for name in wanted if name in flags)
    return Check("isa", f"{platform.machine()} {found}".strip(), True)


def _extension() -> Check:
    rebuild = "install torch and g++ and then esper again (pip install --no-build-isolation .)"
    if os.environ.get(native.DISABLE, "0") not in ("", "0"):
        return Check("extension", f"switched off by {native.DISABLE}", None,
                     f"unset {native.DISABLE} to use it")
    library = native.library_path()
    if library is None:
        return Check("extension", "not built; kernels are called through Python", False, rebuild)
    try:
        import torch
    except (ImportError, OSError):
        return Check("extension", f"built ({library.name}), not loaded: no torch", False,
                     "install torch")
    info = native.read_build_info(library)
    problem = native.why_not(info, str(torch.__version__))
    if problem is not None:
        return Check("extension", f"not loaded: {problem}", False, rebuild)
    try:
        import esper._C  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as e:
        return Check("extension", f"not loaded: {e}", False, rebuild)
    return Check("extension", f"loaded, built for {info}", True)


def _triton() -> Check:
    if importlib.util.find_spec("triton") is None:
        return Check("triton", "not installed", None)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Check("triton", version("triton"), True)
    except PackageNotFoundError:
        return Check("triton", "installed, version not known", True)


def _grpc() -> Check:
    """What `esper serve` and its clients stand on."""
    try:
        import google.protobuf
        import grpc
    except ImportError as e:
        return Check("grpc", f"cannot be imported: {e}", False,
                     "install grpcio and protobuf: without them a library is served to nobody")
    return Check("grpc", f"{grpc.__version__}, protobuf {google.protobuf.__version__}", True)


def _idle() -> Check:
    """Whether a process may put itself at idle priority, tried out in a child."""
    hint = "the slow track will compete with training; give it cores of its own (taskset)"
    if not hasattr(os, "sched_setscheduler"):
        return Check("idle priority", "this system has no SCHED_IDLE", False, hint)
    code = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return Check("idle priority", "SCHED_IDLE", True)
    reason = done.stderr.strip().split("\n")[-1]
    return Check("idle priority", f"SCHED_IDLE is refused ({reason})", False, hint)


def _sandbox() -> Check:
    """Which of the layers around compilers and foreign kernels are on, tried out in children."""
    try:
        found = available()
    except EsperError as e:
        return Check("sandbox", f"could not be tried: {e}", False,
                     "nothing will be compiled or examined here before this works")
    if not any(found.values()):
        return Check("sandbox", describe(found), True)
    return Check(
        "sandbox", describe(found), None,
        "what is off does not protect this machine from a compiler or a kernel gone wild. The "
        "layers need user namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that "
        "lets unshare and mount pass), or root. Or run the workers where little can be lost",
    )


def _cores() -> Check:
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    found = f"{usable} usable of {os.cpu_count()}"
    if usable == 1:
        return Check("cores", found, True,
                     "with one core, kernels are compiled in the pauses of training only")
    return Check("cores", found, True)


_CHECKS: tuple[Callable[[], Check], ...] = (
    _python, _torch, _cuda, _nvcc, _compiler, _isa, _extension, _triton, _grpc, _idle,
    _sandbox, _cores,
)


def collect() -> list[Check]:
    """Look at everything; takes a second or two, most of it the import of torch."""
    return [check() for check in _CHECKS]


def render(checks: Sequence[Check] | None = None) -> str:
    """The report as text: one line a check, hints below."""
    checks = collect() if checks is None else checks
    sign = {True: "ok", False: "!!", None: "--"}
    width = max((len(c.name) for c in checks), default=0)
    lines = [f"esper {__version__}"]
    lines += [f"  {sign[c.ok]}  {c.name:<{width}}  {c.found}" for c in checks]
    hints = [c for c in checks if c.hint]
    if hints:
        lines += ["", "What to do:"]
        lines += [f"  {c.name}: {c.hint}" for c in hints]
    return "\n".join(lines)
