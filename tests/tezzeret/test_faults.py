"""Whose fault a failed compile is, and what the service does about it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.errors import CompileError, LibraryError
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.library import BlueprintClaim, KernelRecord
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteKind, SiteSignature
from esper.oona import breaker, retry
from esper.oona.breaker import BreakerPolicy
from esper.tezzeret import service
from esper.tezzeret.control import CONTROL
from esper.tezzeret.toolchain import toolchain
from esper.urza.library import LocalLibrary
from tests.support import bottleneck
from tests.urza.support import artifact, blueprint

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=16)
ZOO = [blueprint(n) for n in range(1, 9)]


class Forge:
    """Stands in for the forge: what fails is up to the test, and every compile is noted."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.broken = False
        self.compiled: list[tuple[str, float]] = []

    def compile(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline,
        deadline_seconds: float | None = None, cancelled: Callable[[], bool] = lambda: False,
    ) -> bytes:
        name = "control" if ir.id == CONTROL.id else ir.id
        self.compiled.append((name, time.monotonic()))
        if self.broken or ir.id in self.bad:
            raise CompileError("g++: internal compiler error")
        return artifact(ir, signature)

    def of(self, name: str) -> list[float]:
        return [t for n, t in self.compiled if n == name]

    def close(self) -> None: ...

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *exc: object) -> None: ...


def set_policy(monkeypatch: pytest.MonkeyPatch, policy: BreakerPolicy) -> None:
    policies = {**breaker.POLICIES, "tezzeret_compilation": policy}
    monkeypatch.setattr(breaker, "POLICIES", policies)


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch) -> Forge:
    made = Forge()
    monkeypatch.setattr(service, "Forge", lambda: made)
    monkeypatch.setattr(service, "analyse", lambda ir, signature: None)
    set_policy(monkeypatch, BreakerPolicy(failures=5, recovery=0.5))
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(retry, "JITTER", 0.0)
    return made


def serve(library: LocalLibrary, until: Callable[[], bool], seconds: float = 20) -> None:
    stop = threading.Event()
    worker = threading.Thread(
        target=service.run, args=(library, stop), kwargs={"poll_seconds": 0.01}
    )
    worker.start()
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.005)
    stop.set()
    worker.join(seconds)
    assert not worker.is_alive()


def statuses(library: LocalLibrary) -> list[BlueprintStatus]:
    return [b.status for b in library.blueprints()]


def test_bad_blueprints_are_invalid_and_open_no_breaker(tmp_path: Path, forge: Forge) -> None:
    library = LocalLibrary(tmp_path)
    for ir in ZOO:
        library.submit(ir, SIG, author="test")
        forge.bad.add(ir.id)
    forge.bad.remove(ZOO[-1].id)
    serve(library, lambda: BlueprintStatus.COMPILED in statuses(library))
    assert sorted(statuses(library)) == [BlueprintStatus.COMPILED] + [BlueprintStatus.INVALID] * 7
    reasons = {b.reason for b in library.blueprints() if b.status is BlueprintStatus.INVALID}
    assert reasons == {"g++: internal compiler error"}
    assert len(forge.of("control")) == 7, "each was judged by a control"


def test_a_broken_toolchain_pauses_the_service_and_costs_no_blueprint(
    tmp_path: Path, forge: Forge
) -> None:
    library, forge.broken = LocalLibrary(tmp_path), True
    for ir in ZOO:
        library.submit(ir, SIG, author="test")

    def heal_after_two_probes() -> bool:
        forge.broken = len(forge.of("control")) < 7  # five verdicts, two probes
        return statuses(library) == [BlueprintStatus.COMPILED] * len(ZOO)

    serve(library, heal_after_two_probes)
    assert statuses(library) == [BlueprintStatus.COMPILED] * len(ZOO)
    names = ["control" if n == "control" else "item" for n, _ in forge.compiled]
    assert names[:10] == ["item", "control"] * 5, "five failures open the breaker"
    assert names[10:] == ["control"] * 3 + ["item"] * len(ZOO), "probed without risk, then at work"
    probes = forge.of("control")[4:]
    assert all(b - a >= 0.45 for a, b in itertools.pairwise(probes))


def test_a_failing_store_does_not_cost_the_artifact(
    tmp_path: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, failures = LocalLibrary(tmp_path), [3]
    complete = library.complete_blueprint

    def on_a_full_disk(claim: BlueprintClaim, content: bytes) -> KernelRecord:
        if failures[0]:
            failures[0] -= 1
            raise LibraryError("No space left on device")
        return complete(claim, content)

    monkeypatch.setattr(library, "complete_blueprint", on_a_full_disk)
    library.submit(ZOO[0], SIG, author="test")
    serve(library, lambda: BlueprintStatus.COMPILED in statuses(library))
    assert [n for n, _ in forge.compiled] == [ZOO[0].id] and statuses(library) == ["COMPILED"]


def test_an_unforeseen_error_on_one_item_is_that_items(
    tmp_path: Path, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = LocalLibrary(tmp_path)

    def analyse(ir: BlueprintIR, signature: SiteSignature) -> None:
        if ir.id == ZOO[0].id:
            raise ZeroDivisionError("a case nobody thought of")

    monkeypatch.setattr(service, "analyse", analyse)
    for ir in ZOO[:2]:
        library.submit(ir, SIG, author="test")
    serve(library, lambda: len(set(statuses(library)) - {BlueprintStatus.UNVALIDATED}) > 1)
    second, first = library.blueprints()
    assert first.status is BlueprintStatus.INVALID and "nobody thought of" in first.reason
    assert second.status in (BlueprintStatus.COMPILED, BlueprintStatus.COMPILING)


def test_what_nothing_here_compiles_is_left_to_others_and_keeps_nobody_waiting(
    tmp_path: Path, forge: Forge
) -> None:
    library = LocalLibrary(tmp_path)
    for ir in ZOO[:2]:  # more urgent than what can be done
        library.submit(ir, SIG.model_copy(update={"device": "cuda"}), author="test", interest=0.9)
    library.submit(ZOO[2], SIG, author="test", interest=0.1)
    serve(library, lambda: BlueprintStatus.COMPILED in statuses(library))
    done = {b.signature.device: b.status for b in library.blueprints()}
    assert done == {"cuda": BlueprintStatus.UNVALIDATED, "cpu": BlueprintStatus.COMPILED}
    assert [name for name, _ in forge.compiled] == [ZOO[2].id], "no control, nobody is to blame"
    assert library.claim_blueprint("who has a GPU", 60) is not None


def test_a_kernel_that_is_known_but_damaged_is_compiled_anew(
    tmp_path: Path, forge: Forge
) -> None:
    library = LocalLibrary(tmp_path)
    library.submit(ZOO[0], SIG, author="test", pipeline=Pipeline.FAST)
    claim = library.claim_blueprint("before", 60)
    assert claim is not None
    made = library.complete_blueprint(claim, artifact(ZOO[0], SIG, tools=toolchain()))
    blob = library.fetch(made.digest)
    for damage in (lambda: blob.write_bytes(b"rotten"), blob.unlink):
        blob.chmod(0o644)
        damage()
        again = library.claim_recompilation(ZOO[0].id, SIG, "again", 60, Pipeline.FAST)
        assert again is not None
        outcome = service.carry(library, again, forge, threading.Event(), None, 0.0)
        assert outcome.startswith("FAST kernel")
    assert len(forge.of(ZOO[0].id)) == 2 and statuses(library) == ["COMPILED"]


@pytest.mark.slow
def test_a_real_compiler_that_breaks_and_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler says its version and then refuses to compile, until the flag is gone."""
    flag, wrapper = tmp_path / "broken", tmp_path / "cxx"
    wrapper.write_text(
        f'#!/bin/sh\nif [ -e {flag} ] && [ "$1" != --version ]; then exit 1; fi\nexec g++ "$@"\n'
    )
    wrapper.chmod(0o755)
    flag.touch()
    monkeypatch.setenv("CXX", str(wrapper))
    toolchain.cache_clear()
    set_policy(monkeypatch, BreakerPolicy(failures=1, recovery=1.0))
    library, ir = LocalLibrary(tmp_path / "library"), bottleneck(SiteKind.FEATURES)
    library.submit(ir, SIG, author="test", pipeline=Pipeline.FAST)
    seen: set[BlueprintStatus] = set()

    def repaired() -> bool:
        seen.update(statuses(library))
        changes = library.history(ir.id)
        if any("released" in c.reason for c in changes):
            flag.unlink(missing_ok=True)
        return BlueprintStatus.COMPILED in seen

    try:
        serve(library, repaired, seconds=480)
    finally:
        toolchain.cache_clear()
    assert BlueprintStatus.COMPILED in seen and BlueprintStatus.INVALID not in seen
