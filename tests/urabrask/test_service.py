"""The service with a real library and real child processes; the kernels are out to hurt it."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from esper.errors import ArtifactCorrupt, EsperError
from esper.leyline.artifact import Manifest, Runtime
from esper.leyline.base import sha256
from esper.leyline.blueprint import parse_blueprint
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.oona import breaker
from esper.oona.breaker import BreakerPolicy
from esper.sandbox.allowance import Allowance
from esper.sandbox.layers import Layer
from esper.sandbox.probe import available
from esper.urabrask import service
from esper.urabrask.runtime import runtime
from esper.urabrask.service import Limits, examine_file
from esper.urza.library import LocalLibrary
from tests.artifacts import members, pack
from tests.urabrask.test_proof import FEATURES

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=8)

# What a hostile library does the moment it is opened.
ATTACKS = {
    "segfault": "*(volatile int *)0 = 1;",
    "exit": "_exit(7);",
    "abort": "abort();",
    "hang": "for (;;) pause();",
    "spin": "for (;;) ;",
    "litter": 'if (!fork()) { setsid(); execlp("sleep", "sleep", "600", (char *)0); } '
    "for (;;) pause();",
    "bomb": "for (;;) { char *p = malloc(1 << 26); if (!p) abort(); memset(p, 1, 1 << 26); }",
    # Slow enough that a test machine on which nothing but the owner holds it survives it.
    "fork": "for (int n = 0; n < 3000; ++n) { if (!fork()) { setsid(); for (;;) pause(); } "
    "usleep(2000); }",
    "fill": 'for (int n = 0; ; ++n) { char name[32]; sprintf(name, "%d", n); '
    'FILE *f = fopen(name, "w"); for (int i = 0; i < 900; ++i) fwrite(block, 1 << 20, 1, f); }',
    "connect": 'struct sockaddr_un to = {.sun_family = AF_UNIX}; strcpy(to.sun_path, '
    'getenv("ESPER_TEST_SOCKET")); int fd = socket(AF_UNIX, SOCK_STREAM, 0); '
    "_exit(fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) ? 9 : 10);",
    # Of the report, and of what is said of the stage: each could be a way to fool the service.
    "flood": 'FILE *f = fopen("report.json", "w"); for (int i = 0; i < 9; ++i) '
    "fwrite(block, 1 << 20, 1, f); _exit(0);",
    "link": 'symlink("/dev/zero", "report.json"); _exit(0);',
    "babble": "for (int fd = 3; fd < 64; ++fd) write(fd, block, 100); _exit(5);",
    "terminated": "kill(getpid(), SIGTERM);",
    "inert": "",
}
HEADERS = ("signal", "stdio", "stdlib", "string", "sys/socket", "sys/stat", "sys/un", "unistd")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One artifact per attack: a real shared object whose constructor carries it out."""
    folder = tmp_path_factory.mktemp("hostile")
    made = {}
    for name, statement in ATTACKS.items():
        source = folder / f"{name}.c"
        source.write_text(
            "".join(f"#include <{name}.h>\n" for name in HEADERS)
            + "static char block[1 << 20];\n"
            f"__attribute__((constructor)) static void attack(void) {{ {statement} }}\n"
        )
        library = source.with_suffix(".so")
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O0", str(source), "-o", str(library)], check=True
        )
        code = library.read_bytes()
        parts = members(FEATURES, SITE, {"forward.so": code, "backward.so": code})
        made[name] = pack(parts.items())
    return made


def _write(folder: Path, content: bytes) -> tuple[Path, str]:
    path = folder / "kernel.esper"
    path.write_bytes(content)
    return path, sha256(content)


def _library(root: Path, artifact: bytes) -> tuple[LocalLibrary, KernelRecord]:
    library = LocalLibrary(root)
    with zipfile.ZipFile(io.BytesIO(artifact)) as archive:
        signature = Manifest.model_validate_json(archive.read("manifest.json")).signature
        ir = parse_blueprint(archive.read("blueprint.json"))
    library.submit(ir, signature, author="test")
    claim = library.claim_blueprint("test", 60)
    assert claim is not None
    return library, library.complete_blueprint(claim, artifact)


def _children() -> set[int]:
    """Processes below this one; torch.compile, used by earlier tests, keeps some of its own."""
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("segfault", "was killed by SIGSEGV during the opening of the artifact"),
        ("exit", "exited with 7 during the opening"),
        ("abort", "was killed by SIGABRT"),
        ("hang", "did not finish within 12 s during the opening"),
        ("bomb", "was killed by SIGABRT"),
        ("fork", "started more than 64 processes during the opening"),
        ("flood", "left no readable report ([Errno 27] has more than 4 MiB: 'report.json')"),
        ("link", "left no readable report ([Errno 40] Too many levels of symbolic links"),
        ("babble", "exited with 5 during "),
        ("terminated", "was killed by SIGTERM during the opening"),
    ],
)
def test_a_kernel_that_kills_its_process_is_rejected_with_the_reason(
    hostile: dict[str, bytes], tmp_path: Path, attack: str, says: str
) -> None:
    path, digest = _write(tmp_path, hostile[attack])
    before = _children()
    seconds = 12 if attack == "hang" else 60
    report = examine_file(
        path, "k-hostile", digest, Limits(deadline_seconds=seconds, memory_bytes=2 << 30)
    )
    assert report is not None and not report.accepted
    assert says in report.reason
    assert not _children() - before


def test_a_kernel_that_fills_the_disk_is_stopped(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = _write(tmp_path, hostile["fill"])
    small = Allowance(memory_bytes=2 << 30, disk_bytes=64 << 20)
    monkeypatch.setattr(Limits, "allowance", lambda self: small)
    report = examine_file(path, "k", digest)
    assert report is not None and "wrote more than 64 MiB to its folder" in report.reason


def test_a_kernel_reaches_nobody(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if available()[Layer.SOCKETS]:
        pytest.skip(f"no filter of system calls here: {available()[Layer.SOCKETS]}")
    monkeypatch.setenv("ESPER_TEST_SOCKET", str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        path, digest = _write(tmp_path, hostile["connect"])
        report = examine_file(path, "k", digest)
        assert report is not None and "exited with 9" in report.reason
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_what_a_killed_child_started_is_killed_too(
    hostile: dict[str, bytes], tmp_path: Path
) -> None:
    path, digest = _write(tmp_path, hostile["litter"])
    started: list[psutil.Process] = []
    stop = threading.Event()

    def watch() -> None:
        while not started and not stop.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name() == "sleep":
                        started.append(process)
        stop.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert examine_file(path, "k", digest, give_up=(stop,)) is None
    finally:
        stop.set()
        watcher.join()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert started and not alive


def test_an_elf_that_is_no_kernel_is_rejected(hostile: dict[str, bytes], tmp_path: Path) -> None:
    path, digest = _write(tmp_path, hostile["inert"])
    report = examine_file(path, "k-inert", digest)
    assert report is not None and not report.accepted
    assert "during the opening of the artifact" in report.reason


def test_a_damaged_artifact_is_rejected(hostile: dict[str, bytes], tmp_path: Path) -> None:
    path, _ = _write(tmp_path, hostile["inert"])
    report = examine_file(path, "k-damaged", "0" * 64)
    assert report is not None and report.reason.startswith("ArtifactCorrupt: ")


def test_a_child_that_cannot_start_is_not_the_kernels_fault(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, record = _library(tmp_path / "library", hostile["inert"])
    runtime.cache_clear()  # an earlier test may have found out already
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        with pytest.raises(EsperError, match="which kernels run here"):
            service.run(library, threading.Event(), worker_name="w", once=True)
    runtime()
    available()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EsperError, match="before it began"):
        service.run(library, threading.Event(), worker_name="w", once=True)
    assert library.kernel(record.kernel_id).status is KernelStatus.PENDING_BENCHMARKING


def test_an_installation_that_starts_no_child_is_not_asked_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = BreakerPolicy(failures=3, recovery=1.0)
    monkeypatch.setattr(breaker, "POLICIES", {**breaker.POLICIES, "urabrask_validation": policy})
    tries: list[float] = []
    stop = threading.Event()

    @functools.cache
    def broken() -> Runtime:
        tries.append(time.monotonic())
        if len(tries) == 5:
            stop.set()
        raise EsperError("no child could be started")

    monkeypatch.setattr(service, "runtime", broken)
    service.run(LocalLibrary(tmp_path), stop, worker_name="w", poll_seconds=0.01)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(gaps) == 4 and max(gaps[:2]) < 0.9 < min(gaps[2:])


def test_after_three_failures_of_the_machine_kernels_are_left_alone_until_a_probe_succeeds(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = BreakerPolicy(failures=3, recovery=1.5)
    monkeypatch.setattr(breaker, "POLICIES", {**breaker.POLICIES, "urabrask_validation": policy})
    library, record = _library(tmp_path / "library", hostile["inert"])
    runtime()
    tries: list[float] = []
    examine, full = service._check_room, [True]

    def full_disk(folder: Path) -> None:
        tries.append(time.monotonic())
        if full[0]:
            raise EsperError("No space left on device")
        examine(folder)

    # The kernel does make its child fail, which would be its own fault on a sound machine.
    monkeypatch.setattr(service, "_check_room", full_disk)
    monkeypatch.setattr(
        service, "_run_child", lambda spec, *_: os.write(spec.stage, b"x\n") and "exited with 1"
    )
    stop = threading.Event()
    worker = threading.Thread(target=service.run, args=(library, stop),
                              kwargs={"worker_name": "w", "poll_seconds": 0.01})
    worker.start()
    end = time.monotonic() + 20
    while len(tries) < 5 and time.monotonic() < end:
        full[0] = len(tries) < 4
        time.sleep(0.005)
    while library.kernel(record.kernel_id).report is None and time.monotonic() < end:
        time.sleep(0.02)
    stop.set()
    worker.join(60)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(gaps) == 4 and max(gaps[:2]) < 1 < 1.4 < min(gaps[2:]), "3 tries, probe, probe"
    assert library.kernel(record.kernel_id).status is KernelStatus.REJECTED


def test_the_service_rejects_a_crashing_kernel_and_goes_on(
    hostile: dict[str, bytes], tmp_path: Path
) -> None:
    library, record = _library(tmp_path / "library", hostile["segfault"])
    assert service.run(library, threading.Event(), worker_name="w", once=True) == 1
    after = library.kernel(record.kernel_id)
    assert after.status is KernelStatus.REJECTED
    assert after.report is not None and "SIGSEGV" in after.report.reason
    assert service.run(library, threading.Event(), worker_name="w", once=True) == 0


def test_stopping_gives_the_kernel_back(hostile: dict[str, bytes], tmp_path: Path) -> None:
    library, record = _library(tmp_path / "library", hostile["hang"])
    before = _children()
    stop = threading.Event()
    worker = threading.Thread(
        target=service.run, args=(library, stop), kwargs={"worker_name": "w", "lease_seconds": 6}
    )
    worker.start()
    end = time.monotonic() + 120
    while not library.leases() and time.monotonic() < end:
        time.sleep(0.05)
    # Longer than the lease: only the heartbeat keeps it.
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        time.sleep(0.5)
        assert library.claim_kernel("thief", 10) is None
    stop.set()
    worker.join(60)
    assert not worker.is_alive()
    assert library.kernel(record.kernel_id).status is KernelStatus.PENDING_BENCHMARKING
    assert not _children() - before


def test_a_child_that_is_ended_together_with_its_service_is_no_verdict(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a supervisor or systemd does it: everybody gets the signal, in no order."""
    library, record = _library(tmp_path / "library", hostile["terminated"])
    stop, ended = threading.Event(), service._ended

    def child_first(pid: int) -> bool:
        if gone := ended(pid):
            threading.Timer(0.05, stop.set).start()
        return gone

    monkeypatch.setattr(service, "_ended", child_first)
    assert service.run(library, stop, worker_name="w") == 0
    back = library.kernel(record.kernel_id)
    assert back.status is KernelStatus.PENDING_BENCHMARKING and back.reason == "released by w"


def test_an_artifact_that_the_library_has_no_more_is_rejected_and_holds_nobody_up(
    hostile: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server finds rot when it is asked for the file, and says so each time."""
    library, record = _library(tmp_path / "library", hostile["inert"])

    def rotten(digest: str) -> Path:
        raise ArtifactCorrupt("its disk is failing")

    monkeypatch.setattr(library, "fetch", rotten)
    assert service.run(library, threading.Event(), worker_name="w", once=True) == 1
    after = library.kernel(record.kernel_id)
    assert after.status is KernelStatus.REJECTED and "its disk is failing" in after.reason


def test_the_child_stays_in_the_session_and_dies_with_its_parent(
    hostile: dict[str, bytes], tmp_path: Path
) -> None:
    path, digest = _write(tmp_path, hostile["hang"])
    code = (
        "import sys, pathlib\nfrom esper.urabrask.service import examine_file\n"
        "examine_file(pathlib.Path(sys.argv[1]), 'k', sys.argv[2])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(path), digest])
    try:
        deadline = time.monotonic() + 60
        children: list[psutil.Process] = []
        while not children and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(psutil.NoSuchProcess):
                children = [p for p in psutil.Process(parent.pid).children()
                            if "esper.urabrask.child" in p.cmdline()]
        time.sleep(3)  # until it hangs in the kernel
        children += children[0].children(recursive=True)
        assert {os.getsid(child.pid) for child in children} == {os.getsid(0)}
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive


@pytest.mark.slow
def test_a_real_kernel_is_validated(feature_artifact: Path, tmp_path: Path) -> None:
    library, record = _library(tmp_path / "library", feature_artifact.read_bytes())
    assert service.run(library, threading.Event(), worker_name="w", once=True) == 1
    after = library.kernel(record.kernel_id)
    assert after.status is KernelStatus.VALIDATED, after.report and after.report.reason
    report = after.report
    assert report is not None and len(report.measurements) == 2
    assert report.hardware is not None and report.hardware.threads == 1
    assert all(m.kernel_seconds and m.eager_seconds for m in report.measurements)
    assert report.proof and report.risk is not None and report.roofline is not None
    assert {d.dtype for d in report.drift} == {"float32", "bfloat16"}
    found = library.kernels(
        signature=record.manifest.signature,
        status=KernelStatus.VALIDATED,
        tags=[t.name for t in report.tags],
    )
    assert [k.kernel_id for k in found] == [record.kernel_id]
