"""Artifacts whose code can be opened, held and closed, and does nothing (tests/csrc/hollow.c)."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from esper.leyline.blueprint import BlueprintIR, C, Node, Op
from esper.leyline.signature import SiteKind, SiteSignature
from tests.artifacts import members, pack

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=8)
IR = BlueprintIR(
    kind=SiteKind.FEATURES,
    nodes=(
        Node(id="a", op=Op.LINEAR, inputs=("h",), out=C),
        Node(id="b", op=Op.ADD, inputs=("a", "h")),
    ),
    output="b",
)


@lru_cache(maxsize=1)
def code() -> bytes:
    source = Path(__file__).parent / "csrc" / "hollow.c"
    with TemporaryDirectory() as folder:
        target = Path(folder, "hollow.so")
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", target], check=True)
        return target.read_bytes()


def artifact(folder: Path, tag: str = "", size: int = 0, **changes: Any) -> tuple[Path, str]:
    """Path and digest of an artifact of its own for each `tag`, of at least `size` bytes of code.

    What follows the last section of an ELF file is nobody's, so a tag does not disturb it.
    """
    libraries = {name: code() + f"{name} {tag}".encode() for name in ("forward.so", "backward.so")}
    libraries["backward.so"] += bytes(max(0, size - sum(map(len, libraries.values()))))
    content = pack(members(IR, SITE, libraries, **changes).items())
    path = folder / f"hollow-{tag}.esper"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def code_bytes(tag: str = "") -> int:
    """How many bytes of code an artifact of this tag has."""
    return sum(len(code()) + len(f"{name} {tag}") for name in ("forward.so", "backward.so"))


def load(cache: Any, path: Path, digest: str) -> Any:
    return opening(cache, path, digest).wait()


def opening(cache: Any, path: Path, digest: str) -> Any:
    sealed = cache.read(str(path), digest).wait()
    manifest = json.loads(sealed.manifest)
    return cache.open(sealed, manifest["backward_inputs"], manifest["gradients"], "cpu", "float32")


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """A pool's thread lets go of its task a moment after the task's result is there."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        gc.collect()
        time.sleep(0.005)
    return True


def digest_of(tmp_path: Path, tag: str) -> str:
    return hashlib.sha256((tmp_path / f"hollow-{tag}.esper").read_bytes()).hexdigest()
