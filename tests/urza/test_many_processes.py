"""One folder, several threads, processes and forks at once."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper.errors import ArtifactCorrupt, IllegalTransition, LibraryError, NotInLibrary, StaleClaim
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.urza import store as store_module
from esper.urza.blobs import BlobFolder
from esper.urza.library import LocalLibrary
from tests.urza.support import OTHER, SIG, artifact, blueprint, in_child, report

CLAIMER = """
import sys
from esper.urza.library import LocalLibrary
library = LocalLibrary(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
while claim := library.claim_blueprint(sys.argv[2], 60):
    print(claim.token, claim.record.blueprint_id, flush=True)
"""


def test_two_processes_never_claim_the_same_item(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", CLAIMER, str(tmp_path), name], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("a", "b")  # both also race to create the schema
    ]
    assert all(w.stdout is not None and w.stdout.readline() == "ready\n" for w in workers)
    library = LocalLibrary(tmp_path)
    for n in range(1, 61):
        library.submit(blueprint(n), SIG, author="karn")
    for w in workers:
        assert w.stdin is not None
        w.stdin.write("go\n")
        w.stdin.flush()
    claimed = [line.split() for w in workers for line in w.communicate(timeout=240)[0].splitlines()]
    assert len({token for token, _ in claimed}) == len(claimed) == 60
    assert {item for _, item in claimed} == {blueprint(n).id for n in range(1, 61)}


def test_threads_share_one_library(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: library.submit(blueprint(n), SIG, author="k"), range(1, 41)))
        claims = list(pool.map(lambda n: library.claim_blueprint("w", 60), range(44)))
    tokens = [c.token for c in claims if c is not None]
    assert sorted(tokens) == list(range(1, 41))


def test_forks_in_the_middle_of_writing_lose_nothing(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    stop = threading.Event()
    written: list[int] = []

    def write() -> None:
        while not stop.is_set():
            library.submit(blueprint(len(written) + 1), SIG, author="parent")
            written.append(len(written) + 1)
            time.sleep(0.002)
            claim = library.claim_blueprint("parent", 600)
            assert claim is not None

    thread = threading.Thread(target=write)
    thread.start()

    def child_writes(n: int) -> None:
        assert library._store._idle == [], "no connection crosses the fork"
        for m in range(5):
            library.submit(blueprint(1000 + 10 * n + m), OTHER, author="child")

    codes = [in_child(lambda n=n: child_writes(n)) for n in range(8)]  # type: ignore[misc]
    stop.set()
    thread.join()
    assert codes == [0] * 8
    library.close()
    again = LocalLibrary(tmp_path)
    assert len(again.blueprints(OTHER)) == 40 and len(again.blueprints(SIG)) == len(written) > 0
    check = sqlite3.connect(tmp_path / "library.db")
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert check.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    check.close()


def test_a_fork_that_ran_no_hooks_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = LocalLibrary(tmp_path)
    (inherited,) = library._store._idle
    monkeypatch.setattr(library._store, "_pid", os.getpid() + 1)
    library.submit(blueprint(), SIG, author="karn")
    assert inherited in store_module._INHERITED and inherited not in library._store._idle
    store_module._INHERITED.remove(inherited)


def test_newer_and_foreign_databases_are_refused_untouched(tmp_path: Path) -> None:
    LocalLibrary(tmp_path / "new").close()
    with sqlite3.connect(tmp_path / "new" / "library.db") as con:
        con.execute("PRAGMA user_version = 99")
    con.close()
    with pytest.raises(LibraryError, match=r"version 99.*newer esper"):
        LocalLibrary(tmp_path / "new")
    for version in (0, store_module.SCHEMA_VERSION, 99):
        folder = tmp_path / f"foreign-{version}"
        folder.mkdir()
        with sqlite3.connect(folder / "library.db") as con:
            con.execute("CREATE TABLE theirs (x)")
            con.execute(f"PRAGMA user_version = {version}")
        con.close()
        before = (folder / "library.db").read_bytes()
        with pytest.raises(LibraryError, match="something else"):
            LocalLibrary(folder)
        assert (folder / "library.db").read_bytes() == before
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "library.db").write_bytes(b"noise" * 1000)
    with pytest.raises(LibraryError, match="not a database"):
        LocalLibrary(tmp_path / "noise")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LibraryError, match="choose a folder"):
        LocalLibrary(tmp_path / "file")


def test_a_failed_transaction_leaves_its_connection_fit_for_use(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    with pytest.raises(LibraryError, match="no such table"), library._store.write() as con:
        con.execute("INSERT INTO fence VALUES (7)")
        con.execute("SELECT * FROM nowhere")
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 60)
    assert claim is not None and claim.token == 1


def test_history_lineage_and_recompilation(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.submit(blueprint(1), SIG, author="karn")
    library.submit(blueprint(2), SIG, author="karn", parents=(blueprint(1).id,))
    library.submit(blueprint(3), SIG, author="karn", parents=(blueprint(2).id, blueprint(1).id))
    assert library.ancestors(blueprint(3).id) == sorted([blueprint(1).id, blueprint(2).id])
    ir = blueprint(1)
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None and claim.record.ir == ir
    kernel = library.complete_blueprint(claim, artifact(ir))
    again = library.claim_recompilation(ir.id, SIG, "tezzeret", 60)
    assert again is not None
    assert library.complete_blueprint(again, artifact(ir)) == kernel, "the same code, once"
    work = library.claim_kernel("urabrask", 60)
    assert work is not None
    with pytest.raises(IllegalTransition):
        library.reinstate(kernel.kernel_id, "a way round the proof")
    library.complete_kernel(work, report(kernel.kernel_id))
    library.quarantine(kernel.kernel_id, "NaN")
    library.reinstate(kernel.kernel_id, "the data were at fault")
    library.quarantine(kernel.kernel_id, "NaN again")
    library.retire(kernel.kernel_id, "enough")
    trail = [(c.before, c.after) for c in library.history(kernel.kernel_id)]
    assert [after for _, after in trail] == [
        "PENDING_BENCHMARKING", "BENCHMARKING", "VALIDATED", "QUARANTINED", "VALIDATED",
        "QUARANTINED", "RETIRED",
    ]
    assert [before for before, _ in trail] == [None, *(after for _, after in trail[:-1])]
    assert library.claim_kernel("urabrask", 60) is None, "retired by a person: for good"
    assert library.kernel(kernel.kernel_id).status is KernelStatus.RETIRED
    with pytest.raises(NotInLibrary):
        library.history("bp-none")


def test_what_a_person_archived_stays_archived(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.archive(blueprint().id, SIG, "not wanted")
    with pytest.raises(StaleClaim):
        library.release(claim)
    record = library.submit(blueprint(), SIG, author="karn")
    assert (record.status, record.reason) == (BlueprintStatus.ARCHIVED, "not wanted")
    with pytest.raises(IllegalTransition):
        library.archive(blueprint().id, SIG, "twice")


def test_blobs_have_a_largest_size(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path, max_bytes=4)
    with pytest.raises(ArtifactCorrupt, match="at most 4"):
        folder.put(b"12345")
    digest = folder.put(b"1234")
    path = folder.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"12345")
    with pytest.raises(ArtifactCorrupt):
        folder.path(digest)
    assert folder.digests() == {digest}
