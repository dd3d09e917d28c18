"""serve, worker and status as processes of their own, and a person's care for the library."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.cli.config import parse_config
from esper.cli.main import parser
from esper.leyline.command import FieldReport
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, SeedState
from esper.rpc.address import open_library
from esper.urza.library import LocalLibrary
from tests.artifacts import members, pack
from tests.cli.test_commands import _environment, esper_command
from tests.rpc.certificates import TOKENS, write_network
from tests.rpc.support import wait_until
from tests.urza.support import OTHER, SIG, artifact, blueprint, report


@contextmanager
def process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """One running command, ended at the latest with the test; standard error goes to `log`."""
    with log.open("w") as errors:
        running = subprocess.Popen(
            [sys.executable, "-m", "esper.cli.main", *arguments], stdout=subprocess.PIPE,
            stderr=errors, text=True, env={**_environment(), "PYTHONFAULTHANDLER": "1"})
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()
        assert running.stdout is not None
        running.stdout.close()


def line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline()


def end(running: subprocess.Popen[str]) -> int:
    """Its exit status. One that does not stop writes the stacks of its threads to its log."""
    running.send_signal(signal.SIGTERM)
    try:
        return running.wait(120)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGABRT)
        return running.wait(30)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


def validated(library: LocalLibrary, n: int = 1, *tags: str) -> str:
    parents = (blueprint(n - 1).id,) if n > 1 else ()
    library.submit(blueprint(n), SIG, author="karn", parents=parents)
    claim = library.claim_blueprint("forge", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact(claim.record.ir))
    work = library.claim_kernel("bench", 60)
    assert work is not None
    return library.complete_kernel(work, report(work.record.kernel_id, *tags)).kernel_id


def test_the_guide_is_understood() -> None:
    """Its commands by the parser, its configuration by the one of `esper train`."""
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL)
    commands = [c.partition("#")[0] for c in "".join(blocks).replace("\\\n", "").splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert shlex.split(command)[0] == "esper"
        parser().parse_args(shlex.split(command)[1:])
    (yaml,) = (b for b in re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
               if b.startswith("library:"))
    model = 'name: x\nmodel: {factory: "a.py:B"}\ndata: {name: digits}\ntrain: {epochs: 1}\n'
    assert parse_config(model + yaml).library.urza == "urza.example:50051"


def test_serve_status_and_a_clean_end(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    with process("serve", "--library", str(folder), log=tmp_path / "log") as serving:
        assert f"unix:{folder}/urza.sock" in line(serving)
        library = open_library(f"unix:{folder}/urza.sock")
        library.submit(blueprint(), SIG, author="karn")
        library.submit(blueprint(), OTHER, author="karn")
        claim = library.claim_blueprint("a-worker", 600)
        assert claim is not None
        library.reject_blueprint(claim, "too deep by far")
        assert library.claim_blueprint("another-worker", 600) is not None
        for where in (f"unix:{folder}/urza.sock", str(folder)):
            done = esper_command("status", "--urza", where)
            assert done.returncode == 0, done.stderr
            for part in ("capacity 1 (normal", "karn_to_tezzeret", "100", "at work  1",
                         "another-worker", "INVALID", "too deep by far"):
                assert part in done.stdout, (part, done.stdout)
            assert "\x1b" not in done.stdout, "plain in a pipe"
        assert end(serving) == 0
        assert "stopped" in line(serving)
    assert not (folder / "urza.sock").exists()
    gone = esper_command("status", "--urza", f"unix:{folder}/urza.sock")
    assert gone.returncode == 2 and "esper serve" in gone.stderr and "Traceback" not in gone.stderr


def test_brackets_in_what_others_wrote_are_shown_as_they_are(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    ir = blueprint().model_copy(update={"name": "[/a][red]b"})
    library.submit(ir, SIG, author="[/c]")
    assert library.claim_blueprint("[/d]", 60) is not None
    library.submit(blueprint(2), SIG, author="karn")
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.reject_blueprint(claim, "[/e] failed: [f, g]")
    for command, wanted in ((["status", "--urza"], ["[/d]", "[/e] failed: [f, g]"]),
                            (["library", "ls", "--blueprints", "--library"],
                             ["[/a][red]b", "[/c]", "[/e] failed: [f, g]"])):
        done = esper_command(*command, str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert all(part in done.stdout for part in wanted), done.stdout


def test_serve_on_a_network(tmp_path: Path) -> None:
    folder = str(tmp_path / "library")
    refused = esper_command("serve", "--library", folder, "--listen", "127.0.0.1:0")
    assert refused.returncode == 2 and "without TLS and tokens" in refused.stderr
    network = write_network(tmp_path)
    secrets = ["--tls-cert", str(network.tls_cert), "--tls-key", str(network.tls_key)]
    half = esper_command("serve", "--library", folder, "--listen", "127.0.0.1:0", *secrets)
    assert half.returncode == 2 and "together" in half.stderr
    with process("serve", "--library", folder, "--listen", "127.0.0.1:0", *secrets,
                 "--tokens", str(network.tokens), log=tmp_path / "log") as serving:
        address = line(serving).split()[-1]
        access = ["--token-file", str(tmp_path / "reader.token"),
                  "--tls-ca", str(network.tls_cert)]
        assert "capacity 1" in esper_command("status", "--urza", address, *access).stdout
        # The token is good, for reading: no service may go on asking with it for ever.
        for command in (["worker", "urabrask", "--urza", address, *access],
                        ["library", "archive", "bp-", "--library", address, *access],
                        ["status", "--urza", address]):
            done = esper_command(*command)
            assert done.returncode == 2 and done.stderr.count("esper: ") == 1, (command, done)
        assert end(serving) == 0
    said = (tmp_path / "log").read_text()
    assert not any(token in said for token in TOKENS.values())


@pytest.mark.parametrize("option", [("--pipeline", "FAST"), ("--cuda-arch", "sm_90")])
def test_what_is_tezzerets_is_refused_to_others(option: tuple[str, str], tmp_path: Path) -> None:
    done = esper_command("worker", "karn", "--urza", f"unix:{tmp_path}/s", *option)
    assert done.returncode == 2 and f"{option[0]} is for tezzeret, not karn" in done.stderr


def test_a_worker_gives_its_lease_back_when_it_is_told_to_stop(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    library = LocalLibrary(folder)
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("forge", 60)
    assert claim is not None
    # Of this machine's torch and ISA, or no worker here would take it.
    parts = members(claim.record.ir, SIG, {"forward.so": b"forward", "backward.so": b"backward"})
    kernel = library.complete_blueprint(claim, pack(parts.items()))
    with process("serve", "--library", str(folder), log=tmp_path / "serve.log") as serving:
        address = line(serving).split()[-1]
        with process("worker", "urabrask", "--urza", address, "--concurrency", "2",
                     log=tmp_path / "worker.log") as worker:
            assert "2 at a time" in line(worker)
            assert wait_until(library.leases, 60), (tmp_path / "worker.log").read_text()
            assert "urabrask@" in library.leases()[0].worker
            assert end(worker) == 0, (tmp_path / "worker.log").read_text()
        assert library.leases() == []
        back = library.kernel(kernel.kernel_id)
        assert back.status is KernelStatus.PENDING_BENCHMARKING and "released" in back.reason
        assert end(serving) == 0


def test_query_lists_what_a_run_could_choose_from(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    both = validated(library, 1, "low_memory", "high_speed")
    one = validated(library, 2, "low_memory")
    library.quarantine(validated(library, 3, "low_memory"), "NaN")

    def found(*arguments: str) -> list[str]:
        done = esper_command("library", "query", "--library", str(tmp_path), "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return [k["kernel_id"] for k in json.loads(done.stdout)]

    assert sorted(found()) == sorted([both, one])
    assert found("--tag", "low_memory", "--tag", "high_speed") == [both]
    assert sorted(found("--tag", "low_memory", "--signature", "features[8]")) == sorted([both, one])
    assert found("--signature", "map") == []
    shown = esper_command("library", "query", "--tag", "high_speed", "--library", str(tmp_path))
    assert both[:14] in shown.stdout and one[:14] not in shown.stdout


def test_lineage_goes_both_ways_and_tells_outcomes(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    kernels = [validated(library, n) for n in (1, 2, 3)]
    for n, (outcome, gain) in enumerate([(SeedState.FOSSILIZED, 0.5), (SeedState.FOSSILIZED, 0.25),
                                         (SeedState.CULLED, None)]):
        library.add_report(FieldReport(
            report_id=f"fr-{n}", run_id="r", trace_id="t", site="s", kernel_id=kernels[1],
            blueprint_id=blueprint(2).id, outcome=outcome, reason="", gain=gain, epochs=1,
            loss_before=2.0))
    done = esper_command("library", "lineage", kernels[1], "--library", str(tmp_path))
    assert done.returncode == 0, done.stderr
    above, below = done.stdout.split("descendants")
    assert blueprint(1).id[:14] in above and blueprint(3).id[:14] in below
    assert "2 FOSSILIZED, 1 CULLED; +12.5% of the loss in 3 reports, to expect" in above
    assert "never in the field" in below
    youngest = esper_command("library", "lineage", blueprint(3).id, "--library", str(tmp_path))
    assert "descendants: none" in youngest.stdout and blueprint(1).id[:14] in youngest.stdout


def test_archiving_takes_out_of_use_and_deletes_nothing(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    kernel = validated(library)
    library.submit(blueprint(), OTHER, author="karn")
    done = esper_command("library", "archive", blueprint().id[:12], "--reason", "not wanted",
                         "--library", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("-> ARCHIVED") == 2, done
    assert {(b.status, b.reason) for b in library.blueprints()} == {
        (BlueprintStatus.ARCHIVED, "not wanted")}
    assert library.kernel(kernel).status is KernelStatus.VALIDATED
    done = esper_command("library", "archive", kernel, "--library", str(tmp_path))
    assert "VALIDATED -> RETIRED" in done.stdout
    assert library.kernel(kernel).status is KernelStatus.RETIRED
    assert library.fetch(library.kernel(kernel).digest).exists()
    for again in (kernel, blueprint().id):
        done = esper_command("library", "archive", again, "--library", str(tmp_path))
        assert done.returncode == 2 and "already" in done.stderr, done


def test_check_finds_damage_and_orphans(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    first, second = validated(library, 1), validated(library, 2)

    def check() -> subprocess.CompletedProcess[str]:
        return esper_command("library", "check", "--library", str(tmp_path))

    assert check().stdout.strip() == "2 kernels, 0 damaged; 0 orphaned blobs"
    orphan = library._blobs.put(b"nobody's")
    done = check()
    assert done.returncode == 0 and f"orphan: blob {orphan}, 8 bytes" in done.stdout
    blob = library.fetch(library.kernel(first).digest)
    blob.chmod(0o644)
    blob.write_bytes(b"rotten")
    library.fetch(library.kernel(second).digest).unlink()
    done = check()
    assert done.returncode == 1 and "2 damaged; 1 orphaned" in done.stdout
    assert os.path.exists(library.fetch(orphan)), "reported, never deleted"


@pytest.mark.slow
def test_three_workers_and_a_server_make_a_trusted_kernel(tmp_path: Path) -> None:
    """The whole slow track over gRPC: karn invents, tezzeret compiles, urabrask proves."""
    folder = tmp_path / "library"
    LocalLibrary(folder).register_signature(SIG)
    with process("serve", "--library", str(folder), log=tmp_path / "serve.log") as serving:
        address = line(serving).split()[-1]
        with (
            process("worker", "karn", "--urza", address, log=tmp_path / "karn.log") as karn,
            process("worker", "tezzeret", "--urza", address, "--pipeline", "FAST",
                    log=tmp_path / "tezzeret.log") as tezzeret,
            process("worker", "urabrask", "--urza", address, log=tmp_path / "urabrask.log") as u,
        ):
            library = open_library(address)
            assert wait_until(lambda: library.kernels(status=KernelStatus.VALIDATED), 300), [
                (tmp_path / f"{n}.log").read_text()[-2000:] for n in ("tezzeret", "urabrask")]
            assert [end(w) for w in (karn, tezzeret, u)] == [0, 0, 0]
            assert library.leases() == []
            kernel = library.kernels(status=KernelStatus.VALIDATED)[0]
            assert library.fetch(kernel.digest).stat().st_size == kernel.size
        assert end(serving) == 0
