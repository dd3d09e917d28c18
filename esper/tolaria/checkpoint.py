"""Checkpoints on disk: one folder each, whole or not there.

    manifest.json        what this is, and size and SHA-256 of the other two
    state.json           everything that is no tensor
    tensors.safetensors  every tensor

A checkpoint is written beside its place, synced, and renamed into it, so a name stands for whole
and durable content at every moment, whatever kills the writer. It is read in the opposite order:
sizes and digests first, and only then anything is parsed. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esper.errors import CheckpointError
from esper.files import abandoned, sync, temporary_name
from esper.leyline.base import Contract, first_fault, sha256
from esper.tolaria.trees import unpack
from esper.version import __version__

FORMAT_VERSION = 1  # Manifest.format
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
MAX_MANIFEST_BYTES = 64 << 10
MAX_STATE_BYTES = 256 << 20
NAME = re.compile(r"(\d{6})-step-(\d+)")
_PARTIAL = ".partial-"


class Manifest(Contract):
    """What a checkpoint says of itself. `step` and `epoch` count completed ones; `time` is when
    the state was taken, in UTC seconds."""

    format: Literal[1] = 1
    esper: str
    torch: str
    run_id: str
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    time: float
    size: dict[str, int]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back: `state` is the tree that was written."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]


def write_checkpoint(
    path: Path, *, state: Any, tensors: Mapping[str, Tensor], run_id: str, step: int, epoch: int,
    taken: float,
) -> Path:
    """Write what `trees.pack` made as the checkpoint `path`; returns it when it is durable.

    Raises:
        CheckpointError: there is something at `path` already, the state is too large, or the file
            system refused; nothing is left behind.
    """
    content = json.dumps(state, allow_nan=False, ensure_ascii=False).encode()
    if len(content) > MAX_STATE_BYTES:
        raise CheckpointError(f"the state without its tensors takes {len(content)} bytes, at most "
                              f"{MAX_STATE_BYTES} are read back; keep large things as tensors")
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.cpu().contiguous()
        place = held.untyped_storage().data_ptr()
        whole[name] = held.clone() if place in seen else held  # safetensors refuses shared memory
        seen.add(place)
    partial = path.parent / f"{_PARTIAL}{temporary_name()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.exists():
                raise CheckpointError(f"{path} exists; give every checkpoint a name of its own")
            partial.mkdir()
            save_file(whole, partial / TENSORS)
            (partial / STATE).write_bytes(content)
            with (partial / TENSORS).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest = Manifest(
                esper=__version__, torch=torch.__version__, run_id=run_id, step=step, epoch=epoch,
                time=taken,
                size={STATE: len(content), TENSORS: (partial / TENSORS).stat().st_size},
                sha256={STATE: sha256(content), TENSORS: digest})
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
            for name in (TENSORS, STATE, MANIFEST):
                sync(partial / name)
            sync(partial)
            os.rename(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        raise CheckpointError(f"could not write the checkpoint {path}: {e}; free some space or "
                              "check the folder's permissions") from e
    return path


def check(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, if sizes and digests are what it says.

    Raises:
        CheckpointError: it is torn, damaged, or no checkpoint; says how.
    """
    try:
        held = _read_capped(path / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(held, strict=True)
        if set(manifest.size) != {STATE, TENSORS} or set(manifest.sha256) != {STATE, TENSORS}:
            raise CheckpointError(f"{path}: {MANIFEST} speaks of {sorted(manifest.sha256)}, "
                                  f"expected {sorted((STATE, TENSORS))}")
        if manifest.size[STATE] > MAX_STATE_BYTES:
            raise CheckpointError(f"{path}: {STATE} has {manifest.size[STATE]} bytes, at most "
                                  f"{MAX_STATE_BYTES} are read")
        for name in (STATE, TENSORS):
            _check_member(path / name, manifest.size[name], manifest.sha256[name])
    except ValidationError as e:
        raise CheckpointError(f"{path}: {MANIFEST} is not of a checkpoint of format "
                              f"{FORMAT_VERSION}: {first_fault(e)}") from e
    except OSError as e:
        raise CheckpointError(f"{path} is not a checkpoint, or a torn one: {e}") from e
    return manifest


def _read_capped(path: Path, limit: int) -> bytes:
    # O_NONBLOCK: opening a FIFO that somebody left there must not hang.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes; it is not what it is named")
    return content


def _check_member(path: Path, size: int, digest: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        found = os.fstat(fd).st_size
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes, {MANIFEST} says {size}; it is torn")
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != digest:
        raise CheckpointError(f"{path} has SHA-256 {seen}, {MANIFEST} says {digest}; it is damaged")


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, or the newest of a folder of them.

    Raises:
        CheckpointError: it is torn, damaged, foreign, or not there; names the newest good one
            beside it, where there is one.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and (listed := checkpoints_in(path)):
        path = listed[-1]
    try:
        manifest = check(path)
        return Checkpoint(path, manifest, _parse(path))
    except CheckpointError as e:
        good = newest_good(path.parent, path)
        hint = f"the newest good one beside it is {good}" if good else "there is no good one beside"
        raise CheckpointError(f"{e}; {hint}") from e


def _parse(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads((path / STATE).read_bytes())
        state = unpack(tree, load_file(path / TENSORS))
    except (ValueError, RecursionError, SafetensorError) as e:
        raise CheckpointError(f"{path}: cannot be read ({type(e).__name__}: {e})") from e
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {STATE} holds a {type(state).__name__}, not a state")
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder that `Checkpoints` keeps, oldest first; none is opened."""
    try:
        found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)]
    except OSError:
        return []
    return sorted(found, key=lambda p: p.name)


def newest_good(folder: Path, but: Path | None = None) -> Path | None:
    """The newest checkpoint in `folder` that is whole; `but` is not looked at."""
    for path in reversed(checkpoints_in(folder)):
        if path != but:
            try:
                check(path)
            except CheckpointError:
                continue
            return path
    return None


def sweep(folder: Path) -> None:
    """Remove what writers that are no more left half-written."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(_PARTIAL) and abandoned(path, _PARTIAL):
            shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a checkpoint; it is never seen half-removed."""
    gone = path.parent / f"{_PARTIAL}{temporary_name()}"
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
