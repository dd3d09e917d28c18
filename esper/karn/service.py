"""Karn's loop: keep a few blueprints waiting for every signature somebody asked for."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import defaultdict

from esper.errors import EsperError, QueueFull
from esper.karn.mutate import mutate
from esper.karn.templates import templates_for
from esper.leyline.events import Priority
from esper.leyline.library import HIGH_INTEREST, BlueprintRecord, Library
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature

log = logging.getLogger(__name__)
EXPLORATION = 0.25  # share of parents drawn at random, so that no family takes over
TOURNAMENT = 3  # candidates per parent; the fittest is taken
TEMPLATE_INTEREST = 0.6
INHERITED = 0.9  # share of a parent's interest that its mutant is submitted with
# Blueprints for one signature that may be on their way to a trainer or at its disposal, and that
# no seed has tried. More would be invented without evidence, and would keep Tezzeret from making
# better kernels of what has shown its worth, which he does when nothing new waits.
UNTRIED = 8
_AT_DISPOSAL = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.BENCHMARKING,
                KernelStatus.VALIDATED)


def _fitness(library: Library, signature: SiteSignature) -> dict[str, float]:
    """By blueprint: mean gain in the field (as a share of the loss), plus a little for speed."""
    gains: dict[str, list[float]] = defaultdict(list)
    for report in library.reports():
        if report.gain is not None and report.loss_before:
            gains[report.blueprint_id].append(report.gain / abs(report.loss_before))
    fitness = {b: sum(g) / len(g) for b, g in gains.items()}
    for kernel in library.kernels(signature=signature):
        speed = kernel.report.speedup if kernel.report is not None else None
        if speed is not None:
            known = fitness.get(kernel.blueprint_id, 0.0)
            fitness[kernel.blueprint_id] = known + 0.01 * math.log(speed)
    return fitness


def _parent(
    library: Library, signature: SiteSignature, known: list[BlueprintRecord], rng: random.Random
) -> BlueprintRecord | None:
    sound = [b for b in known if b.status is not BlueprintStatus.INVALID]
    if not sound:
        return None
    if rng.random() < EXPLORATION:
        return rng.choice(sound)
    fitness = _fitness(library, signature)
    contenders = [rng.choice(sound) for _ in range(TOURNAMENT)]
    return max(contenders, key=lambda b: fitness.get(b.blueprint_id, 0.0))


def invent(library: Library, signature: SiteSignature, rng: random.Random, name: str) -> bool:
    """Submit one new blueprint for `signature`; False where nothing new came to mind.

    A template that a full queue has dropped is offered again; a dropped mutant is forgotten. A
    mutant of what field reports speak for is no experiment, but work as wanted as a template.

    Raises:
        QueueFull: the library has enough to do.
    """
    known = library.blueprints(signature)
    ids = {b.blueprint_id for b in known}
    archived = {b.blueprint_id for b in known if b.status is BlueprintStatus.ARCHIVED}
    for ir in templates_for(signature):
        if ir.id not in ids - archived:
            record = library.submit(
                ir, signature, author=f"{name}/template", interest=TEMPLATE_INTEREST)
            if record.status is not BlueprintStatus.ARCHIVED:  # else a person took it out
                return True
    parent = _parent(library, signature, known, rng)
    mutant = mutate(parent.ir, signature, rng, ids) if parent is not None else None
    if parent is None or mutant is None:
        return False
    proven = parent.interest > HIGH_INTEREST
    library.submit(mutant, signature, author=f"{name}/mutant",
                   interest=INHERITED * parent.interest,
                   priority=Priority.NORMAL if proven else Priority.EXPERIMENTAL,
                   parents=(parent.blueprint_id,))
    return True


def _untried(
    library: Library, signature: SiteSignature, known: list[BlueprintRecord], tried: set[str]
) -> int:
    """How many of `known`, all for `signature`, a trainer has or will have for the first time.

    `tried` are the kernels of which there are reports. A blueprint whose kernel was rejected or
    quarantined is at nobody's disposal.
    """
    kernels = library.kernels(signature=signature)
    open_to_trial = {b.blueprint_id for b in known
                     if b.status in (BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING)}
    open_to_trial |= {k.blueprint_id for k in kernels if k.status in _AT_DISPOSAL}
    return len(open_to_trial - {k.blueprint_id for k in kernels if k.kernel_id in tried})


def keep_waiting(
    library: Library, stop: threading.Event, rng: random.Random, *, target_depth: int,
    name: str = "karn",
) -> None:
    """Submit until `target_depth` blueprints wait for every signature, or `UNTRIED` are untried.

    The depth is multiplied by the library's capacity factor and rounded down, so that Karn
    gives way early and offers nothing new to a queue that is all but full.

    Raises:
        QueueFull: the library has enough to do.
    """
    wanted = math.floor(target_depth * library.capacity())
    tried = {report.kernel_id for report in library.reports()}
    for signature in library.signatures():
        known = library.blueprints(signature)
        waiting = sum(b.status is BlueprintStatus.UNVALIDATED for b in known)
        if waiting >= wanted:
            continue
        room = UNTRIED - _untried(library, signature, known, tried)
        for _ in range(min(wanted - waiting, room)):
            if stop.is_set() or not invent(library, signature, rng, name):
                break


def run(
    library: Library,
    stop: threading.Event,
    *,
    seed: int = 0,
    poll_seconds: float = 1.0,
    target_depth: int = 4,
    name: str = "karn",
) -> None:
    """Serve until `stop` is set; see `keep_waiting`. A tenth of the time at most goes into looking
    at the library, however large it is."""
    rng = random.Random(seed)
    while not stop.is_set():
        started = time.monotonic()
        try:
            keep_waiting(library, stop, rng, target_depth=target_depth, name=name)
        except QueueFull as e:
            log.info("waiting: %s", e)
        except EsperError:
            log.exception("the library did not answer")
        stop.wait(max(poll_seconds, 10 * (time.monotonic() - started)))
