"""Reading, checking and opening kernel artifacts.

The order is the point. A file is measured, read once, and its digest compared before a
single byte of it is parsed; every later check works on the bytes in memory, so nothing can
change on disk between a check and its use. Machine code is opened last, from a folder that
only this user can enter.

The extension reads, hashes, opens and keeps (csrc/kernel_cache.h); `read_artifact` and
`plain_kernel` stand in for it elsewhere. What an artifact says of itself is checked here for
both, in between.

Nothing here imports Inductor or Dynamo: a training process needs no compiler.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import ArtifactCorrupt, ArtifactMismatch
from esper.kasmina.cache import kernel_cache
from esper.kasmina.launches import as_tuples, check_plan
from esper.kasmina.native import NO_LAUNCHES, open_kernel, runs_on
from esper.leyline.artifact import (
    BACKWARD,
    BLUEPRINT,
    CAPS,
    CUBINS,
    FORWARD,
    MANIFEST,
    MEMBERS,
    PLAN,
    Manifest,
)
from esper.leyline.blueprint import BlueprintIR, parse_blueprint
from esper.leyline.papers import AGAIN, check_papers, read_members
from esper.leyline.signature import SiteSignature

# kernel(h, params, alpha, mode) -> out; mode 0 TRAINING, 1 GRAFTING, 2 FULL
Kernel = Callable[[Tensor, list[Tensor], float, int], Tensor]

# The members and, generously, the zip's own headers.
MAX_ARTIFACT_BYTES = sum(CAPS[name] for name in MEMBERS) + (1 << 16)


@dataclass(frozen=True)
class Artifact:
    """A sound artifact in memory. Whether it runs on this machine is another question. `code` are
    the members beside manifest and blueprint, by their names."""

    manifest: Manifest
    ir: BlueprintIR
    code: Mapping[str, bytes]


@dataclass(frozen=True)
class OpenedKernel:
    """A kernel ready to be called: `kernel(h, params, alpha, mode)`."""

    manifest: Manifest
    ir: BlueprintIR
    kernel: Kernel


def read_artifact(path: str | os.PathLike[str], digest: str) -> Artifact:
    """Read the artifact at `path` if its SHA-256 is `digest` and all of it is in order.

    Raises:
        ArtifactCorrupt: too large, not a plain file, of another digest, not a zip of exactly
            the four members of a layout, or its parts contradict each other.
        FileNotFoundError: there is no such file.
    """
    content = _read_capped(path)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ArtifactCorrupt(
            f"{path}: the SHA-256 is {found}, expected {digest}; the file is damaged or another "
            f"one: {AGAIN}"
        )
    members = read_members(path, content)
    digests = {n: hashlib.sha256(m).hexdigest() for n, m in members.items() if n != MANIFEST}
    manifest, ir = check_papers(path, members[MANIFEST], members[BLUEPRINT], digests)
    code = {name: members[name] for name in members if name not in (MANIFEST, BLUEPRINT)}
    for name in code.keys() - {PLAN}:
        if not code[name].startswith(b"\x7fELF"):
            raise ArtifactCorrupt(f"{path}: {name} is not an ELF file; {AGAIN}")
    if PLAN in code:
        check_plan(path, manifest, code[PLAN], code[CUBINS])
    return Artifact(manifest, ir, code)


def _read_capped(path: str | os.PathLike[str]) -> bytes:
    # O_NONBLOCK: opening a FIFO that somebody left at this path must not hang.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactCorrupt(f"{path}: not a plain file; an artifact is one zip file")
        if status.st_size > MAX_ARTIFACT_BYTES:
            raise ArtifactCorrupt(
                f"{path}: {status.st_size} bytes, an artifact has at most {MAX_ARTIFACT_BYTES}"
            )
        # One byte more than was there is enough to notice that the file grows while read.
        content = bytearray(status.st_size + 1)
        view, filled = memoryview(content), 0
        while filled < len(content) and (n := file.readinto(view[filled:])):
            filled += n
        view.release()
    if filled != status.st_size:
        raise ArtifactCorrupt(f"{path}: the file changed while it was read; try again")
    del content[filled:]
    return bytes(content)


def this_isa(device: str) -> str:
    """What `Toolchain.isa` would say for a kernel built here for `device`.

    Raises:
        ArtifactMismatch: `device` is "cuda" and this process sees no GPU.
    """
    if device == "cpu":
        return str(torch.backends.cpu.get_cpu_capability())
    if not torch.cuda.is_available():
        raise ArtifactMismatch(
            "the kernel is made for a cuda device, this process sees none; choose a kernel for "
            "cpu, or run where there is a GPU"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def check_runs_here(manifest: Manifest, signature: SiteSignature | None = None) -> None:
    """Raise unless a kernel with this manifest may run in this process (at `signature`).

    Raises:
        ArtifactMismatch: names what the kernel is made for and what is here.
    """
    name, made = manifest.kernel_id, manifest.toolchain
    recompile = "let Tezzeret compile the blueprint again here"
    if signature is not None and manifest.signature != signature:
        raise ArtifactMismatch(
            f"kernel {name} is made for {manifest.signature}, the site is {signature}; choose a "
            "kernel for the site's signature"
        )
    if made.torch != torch.__version__:
        raise ArtifactMismatch(
            f"kernel {name} is built for torch {made.torch}, this is torch {torch.__version__}; "
            f"{recompile}"
        )
    here = this_isa(manifest.signature.device)
    if made.isa != here:
        raise ArtifactMismatch(
            f"kernel {name} is built for {made.isa} ({manifest.signature.device}), this machine "
            f"runs {here}; {recompile}"
        )


def open_artifact(
    path: str | os.PathLike[str],
    digest: str,
    signature: SiteSignature | None = None,
    record: Manifest | None = None,
) -> OpenedKernel:
    """Verify the artifact at `path` and open its machine code.

    Takes some milliseconds; call it away from the training thread. With the extension, the
    kernel comes from the process's cache where it is there already, and is read and opened by
    the cache's threads where it is not; nothing here holds Python's lock for long. The compiled
    code stays mapped for as long as the returned kernel lives, and then until the cache needs
    the room.

    Args:
        signature: what the site is; a kernel that is made for another is refused.
        record: the manifest that the library has of the kernel; another one is refused.

    Raises:
        ArtifactCorrupt: see `read_artifact`.
        ArtifactMismatch: see `check_runs_here`; or the manifest is not `record`; or it is made of
            cubins, and the extension that launches them is not here.
        CacheFull: every kernel in the cache is in use, and there is no room for one more.
        RuntimeError: the code cannot be opened.
    """
    cache = kernel_cache()
    if cache is None:
        artifact = read_artifact(path, digest)
        _check_wanted(artifact.manifest, signature, record)
        return OpenedKernel(artifact.manifest, artifact.ir, _open_code(artifact))
    if (kernel := cache.find(digest)) is not None:
        # What has this digest has been checked. It may be wanted for another site, though.
        manifest = Manifest.model_validate_json(kernel.manifest, strict=True)
        _check_wanted(manifest, signature, record)
        return OpenedKernel(manifest, parse_blueprint(kernel.blueprint), kernel)
    sealed = cache.read(os.fspath(path), digest).wait()
    names = sealed.members
    digests = dict(zip(names[1:], sealed.digests, strict=True))
    manifest, ir = check_papers(path, sealed.manifest, sealed.blueprint, digests)
    plan = check_plan(path, manifest, *sealed.code) if PLAN in names else None
    _check_wanted(manifest, signature, record)
    if not runs_on(manifest.signature.device):
        artifact = Artifact(manifest, ir, dict(zip(names[2:], sealed.code, strict=True)))
        return OpenedKernel(manifest, ir, _open_code(artifact))
    kernel = cache.open(
        sealed,
        list(manifest.backward_inputs),
        list(manifest.gradients),
        manifest.signature.device,
        manifest.signature.dtype.value,
        _shapes(manifest),
        as_tuples(plan) if plan is not None else None,
    ).wait()
    return OpenedKernel(manifest, ir, kernel)


def _shapes(manifest: Manifest) -> list[list[int]]:
    """Of h and of each parameter, -1 for batch and space, which are any."""
    return [list(manifest.signature.shape(-1, -1)), *(list(p.shape) for p in manifest.parameters)]


def _check_wanted(
    manifest: Manifest, signature: SiteSignature | None, record: Manifest | None
) -> None:
    check_runs_here(manifest, signature)
    if record is not None and manifest != record:
        differ = [
            name for name in Manifest.model_fields
            if getattr(manifest, name) != getattr(record, name)
        ]
        raise ArtifactMismatch(
            f"the artifact's manifest and the library's of kernel {record.kernel_id} differ in "
            f"{', '.join(differ)}; the library is damaged: choose another kernel"
        )


def _open_code(artifact: Artifact) -> Kernel:
    manifest = artifact.manifest
    if PLAN in artifact.code:
        raise ArtifactMismatch(f"kernel {manifest.kernel_id}: {NO_LAUNCHES}")
    # A fresh 0700 folder per opening, not a memfd: the dynamic linker takes a library whose
    # path it has seen before for the same library, and /proc/self/fd/N comes round again.
    # Once mapped the files are not needed, so they go at once.
    with tempfile.TemporaryDirectory(prefix="esper-kernel-") as folder:
        paths = []
        for name in (FORWARD, BACKWARD):
            target = Path(folder, f"{manifest.kernel_id}-{name}")
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb", buffering=0) as file:
                view = memoryview(artifact.code[name])
                while view:
                    view = view[file.write(view):]
            paths.append(str(target))
        kernel: Kernel = open_kernel(
            paths[0],
            paths[1],
            list(manifest.backward_inputs),
            list(manifest.gradients),
            manifest.signature.device,
            manifest.signature.dtype.value,
            _shapes(manifest),
        )
        return kernel
