"""Templates and mutants: valid, harmless at birth, able to learn; and the service."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from esper.errors import BlueprintError
from esper.karn import service
from esper.karn.mutate import mutate
from esper.karn.templates import TEMPLATES, templates_for
from esper.leyline.command import FieldReport
from esper.leyline.events import Priority
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import BlueprintStatus, SeedState
from esper.leyline.reference import apply, initial_parameters
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.analysis import Budget, analyse
from esper.urza.library import LocalLibrary
from tests.urza.support import artifact, blueprint, report

GENEROUS = Budget(parameters_per_cc=64, minimum_parameters=1 << 16)
SIGNATURES = [
    SiteSignature(kind=kind, channels=c, causal=causal)
    for kind in SiteKind for c in (4, 12, 100)
    for causal in ((False, True) if kind is SiteKind.TOKENS else (False,))
]


def test_there_are_enough_templates_and_all_have_names() -> None:
    assert sum(map(len, TEMPLATES.values())) >= 12
    for signature in SIGNATURES:
        named = [ir.name for ir in templates_for(signature)]
        assert len(named) == len(set(named)) >= 5


@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_templates_equal_their_input_at_birth_and_all_of_them_learns(
    signature: SiteSignature,
) -> None:
    torch.manual_seed(0)
    for ir in templates_for(signature):
        analyse(ir, signature, GENEROUS)
        h = torch.randn(signature.shape(3, 5))
        params = [p.requires_grad_() for p in initial_parameters(ir, signature)]
        assert torch.equal(apply(ir, signature, h, params), h), ir.name
        moved = [False] * len(params)
        target = torch.randn_like(h)
        for _ in range(3):
            loss = (apply(ir, signature, h, params) - target).square().mean()
            grads = torch.autograd.grad(loss, params)
            for i, g in enumerate(grads):
                moved[i] |= bool(g.abs().sum() > 0)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p -= 0.5 * g
        names = [p.name for p in infer(ir, signature).parameters]
        assert all(moved), (ir.name, dict(zip(names, moved, strict=True)))


def test_mutants_are_new_valid_and_harmless_at_birth() -> None:
    rng, refused, made = random.Random(0), 0, 0
    for signature in SIGNATURES:
        known = {ir.id for ir in templates_for(signature)}
        pool = templates_for(signature)
        for _ in range(15):
            mutant = mutate(rng.choice(pool), signature, rng, known)
            assert mutant is not None and mutant.id not in known
            known.add(mutant.id)
            pool.append(mutant)
            infer(mutant, signature)
            h = torch.randn(signature.shape(2, 4))
            params = initial_parameters(mutant, signature)
            assert torch.equal(apply(mutant, signature, h, params), h)
            made += 1
            try:
                analyse(mutant, signature, GENEROUS)
            except BlueprintError:
                refused += 1
    assert refused < made / 5, "most of what is invented should be worth compiling"


def test_the_service_keeps_the_queue_filled_and_records_parents(tmp_path: Path) -> None:
    library, stop = LocalLibrary(tmp_path), threading.Event()
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    library.register_signature(signature)
    thread = threading.Thread(
        target=service.run, args=(library, stop),
        kwargs={"poll_seconds": 0.01, "target_depth": 8},
    )
    thread.start()
    end = time.monotonic() + 10
    while len(library.blueprints()) < 8 and time.monotonic() < end:
        time.sleep(0.02)
    stop.set()
    thread.join(60)
    records = library.blueprints(signature)
    assert len(records) == 8 == library.depths().karn_to_tezzeret
    templates = {ir.id for ir in templates_for(signature)}
    mutants = [r for r in records if r.blueprint_id not in templates]
    assert len(mutants) == 8 - len(templates)
    assert all(r.parents and r.author == "karn/mutant" for r in mutants)


def test_a_template_dropped_from_a_full_queue_is_offered_again(tmp_path: Path) -> None:
    library, rng = LocalLibrary(tmp_path), random.Random(0)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    assert service.invent(library, signature, rng, "karn")
    (first,) = library.blueprints()
    for n in range(1, 101):
        library.submit(blueprint(n), signature, author="test", priority=Priority.STRATEGIC)

    def status() -> BlueprintStatus:
        return next(b.status for b in library.blueprints() if b.blueprint_id == first.blueprint_id)

    assert status() is BlueprintStatus.ARCHIVED and library.capacity() == 0.1
    while library.depths().karn_to_tezzeret > 40:
        library.claim_blueprint("w", 600)
    service.invent(library, signature, rng, "karn")
    assert status() is BlueprintStatus.UNVALIDATED
    library.archive(first.blueprint_id, signature, "a person's wish")
    service.invent(library, signature, rng, "karn")
    assert status() is BlueprintStatus.ARCHIVED


@pytest.mark.parametrize(("others", "offered"), [(10, 4), (60, 2), (80, 1), (95, 0)])
def test_karn_gives_way_as_the_queue_fills(tmp_path: Path, others: int, offered: int) -> None:
    """Of a depth of four, capacity 1, 0.7, 0.3 and 0.1 leave so many."""
    library = LocalLibrary(tmp_path)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    elsewhere = signature.model_copy(update={"channels": 16})
    for n in range(1, others + 1):
        library.submit(blueprint(n), elsewhere, author="somebody else")
    library.register_signature(signature)
    service.keep_waiting(library, threading.Event(), random.Random(0), target_depth=4)
    assert len(library.blueprints(signature)) == offered


def field_report(kernel: KernelRecord, gain: float) -> FieldReport:
    outcome = SeedState.FOSSILIZED if gain > 0 else SeedState.CULLED
    return FieldReport(run_id="r", trace_id="t", site="s", kernel_id=kernel.kernel_id, epochs=5,
                       blueprint_id=kernel.blueprint_id, outcome=outcome, reason="test", gain=gain)


def proven(library: LocalLibrary) -> KernelRecord:
    """What waits first, compiled and accepted."""
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact(claim.record.ir, claim.record.signature))
    work = library.claim_kernel("urabrask", 60)
    assert work is not None
    return library.complete_kernel(work, report(work.record.kernel_id))


def test_a_mutant_inherits_the_interest_that_its_parent_has_earned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, rng = LocalLibrary(tmp_path), random.Random(0)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    (parent,) = templates_for(signature)[:1]
    monkeypatch.setattr(service, "templates_for", lambda signature: [parent])
    monkeypatch.setattr(service, "EXPLORATION", 0.0)
    assert service.invent(library, signature, rng, "karn")
    kernel = proven(library)
    born = []
    for _ in range(3):
        assert service.invent(library, signature, rng, "karn")
        (child,) = (b for b in library.blueprints() if b.status is BlueprintStatus.UNVALIDATED)
        assert child.parents == (parent.id,)
        born.append((round(child.interest, 3), child.priority))
        library.add_report(field_report(kernel, gain=0.2))
        library.archive(child.blueprint_id, signature, "no kin of a mutant is wanted here")
        monkeypatch.setattr(service, "_parent", lambda *_: next(
            b for b in library.blueprints() if b.blueprint_id == parent.id))
    assert born == [(0.54, Priority.EXPERIMENTAL), (0.72, Priority.NORMAL),
                    (0.81, Priority.STRATEGIC)]


def test_karn_invents_no_more_than_trainers_try(tmp_path: Path) -> None:
    library, rng = LocalLibrary(tmp_path), random.Random(0)
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    library.register_signature(signature)
    kernels = []
    while True:
        service.keep_waiting(library, threading.Event(), rng, target_depth=4)
        if not library.depths().karn_to_tezzeret:
            break
        kernels.append(proven(library))
    assert len(kernels) == service.UNTRIED
    library.add_report(field_report(kernels[0], gain=-0.1))
    library.quarantine(kernels[1].kernel_id, "NaN in the field")
    service.keep_waiting(library, threading.Event(), rng, target_depth=4)
    assert library.depths().karn_to_tezzeret == 2, "one was tried, one is of no use"
