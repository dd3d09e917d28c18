"""A process killed at any step of storing a kernel leaves nothing or the whole of it."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.files import temporary_name
from esper.leyline.base import sha256
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.urza.blobs import BlobFolder
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, Clock, artifact, blueprint, in_child


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(name: str, nth: int, *, after: bool) -> Callable[[], None]:
    """Die before or after the nth call of os.<name>."""

    def arm() -> None:
        original, calls = getattr(os, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth and not after:
                die()
            result = original(*args, **kwargs)
            if calls[0] == nth:
                die()
            return result

        setattr(os, name, wrapped)

    return arm


def at_sql(start: str) -> Callable[[], None]:
    """Die as SQLite begins the statement that starts so."""

    def arm() -> None:
        connect = sqlite3.connect

        def connected(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(lambda sql: die() if sql.startswith(start) else None)
            return connection

        sqlite3.connect = connected  # type: ignore[assignment]

    return arm


STEPS = {
    "temporary file written, not synced": at_call("fsync", 1, after=False),
    "temporary file synced": at_call("fsync", 1, after=True),
    "before the rename": at_call("replace", 1, after=False),
    "renamed, folder not synced": at_call("replace", 1, after=True),
    "blob durable": at_call("fsync", 3, after=True),
    "transaction begun": at_sql("BEGIN IMMEDIATE"),
    "kernel row": at_sql("INSERT INTO kernels"),
    "blueprint row": at_sql("UPDATE blueprints SET status"),
    "before the commit": at_sql("COMMIT"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_leaves_nothing_or_the_whole(step: str, tmp_path: Path) -> None:
    clock = Clock()
    library = LocalLibrary(tmp_path, clock)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("doomed", 60)
    assert claim is not None
    data = artifact(blueprint())

    def store() -> None:
        STEPS[step]()
        # COMMIT is also how the check before the blob ends: let that one pass.
        if step == "before the commit":
            library._store.read = library._store.write  # type: ignore[method-assign]
            BlobFolder.put(library._blobs, data)
        library.complete_blueprint(claim, data)

    assert in_child(store) == -signal.SIGKILL
    reopened = LocalLibrary(tmp_path, clock)
    assert reopened.kernels() == [], "the record is the last thing written"
    assert reopened.blueprints()[0].status is BlueprintStatus.COMPILING
    assert not list((tmp_path / "blobs" / "tmp").iterdir()), "the dead writer's file is swept"
    for digest in reopened.orphans():
        assert sha256(reopened.fetch(digest).read_bytes()) == digest, "a blob is whole or absent"
    clock.now += 61
    again = reopened.claim_blueprint("next", 60)
    assert again is not None and again.token > claim.token
    kernel = reopened.complete_blueprint(again, data)
    assert kernel.status is KernelStatus.PENDING_BENCHMARKING and reopened.orphans() == set()
    assert reopened.fetch(kernel.digest).read_bytes() == data


def test_a_kill_right_after_the_commit_keeps_everything(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("doomed", 60)
    assert claim is not None

    def store() -> None:
        library.complete_blueprint(claim, artifact(blueprint()))
        die()

    assert in_child(store) == -signal.SIGKILL
    reopened = LocalLibrary(tmp_path)
    (kernel,) = reopened.kernels()
    assert reopened.fetch(kernel.digest).stat().st_size == kernel.size
    assert reopened.blueprints()[0].status is BlueprintStatus.COMPILED


def test_a_writer_alive_is_counted_and_not_swept(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    (tmp_path / "tmp" / temporary_name()).write_bytes(b"half")
    assert folder.sweep() == 0 and folder.writing() == 1


def test_a_rotten_blob_is_healed_by_storing_it_again(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path)
    path = folder.path(folder.put(b"content"))
    assert path.stat().st_mode & 0o222 == 0, "blobs are read-only"
    path.chmod(0o644)
    path.write_bytes(b"c0ntent")
    assert folder.path(folder.put(b"content")).read_bytes() == b"content"
