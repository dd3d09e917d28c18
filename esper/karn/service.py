"""Karn's loop: keep a few blueprints waiting for every signature somebody asked for."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections import defaultdict

from esper.errors import EsperError, QueueFull
from esper.karn.mutate import mutate
from esper.karn.templates import templates_for
from esper.leyline.events import Priority
from esper.leyline.library import BlueprintRecord, Library
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteSignature

log = logging.getLogger(__name__)
EXPLORATION = 0.25  # share of parents drawn at random, so that no family takes over
TOURNAMENT = 3  # candidates per parent; the fittest is taken
TEMPLATE_INTEREST, MUTANT_INTEREST = 0.6, 0.4


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

    A template that a full queue has dropped is offered again; a dropped mutant is forgotten.

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
    library.submit(mutant, signature, author=f"{name}/mutant", interest=MUTANT_INTEREST,
                   priority=Priority.EXPERIMENTAL, parents=(parent.blueprint_id,))
    return True


def keep_waiting(
    library: Library, stop: threading.Event, rng: random.Random, *, target_depth: int,
    name: str = "karn",
) -> None:
    """Submit until `target_depth` blueprints wait for every signature.

    The depth is multiplied by the library's capacity factor and rounded down, so that Karn
    gives way early and offers nothing new to a queue that is all but full.

    Raises:
        QueueFull: the library has enough to do.
    """
    wanted = math.floor(target_depth * library.capacity())
    for signature in library.signatures():
        waiting = sum(b.status is BlueprintStatus.UNVALIDATED
                      for b in library.blueprints(signature))
        for _ in range(wanted - waiting):
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
    """Serve until `stop` is set; see `keep_waiting`."""
    rng = random.Random(seed)
    while not stop.is_set():
        try:
            keep_waiting(library, stop, rng, target_depth=target_depth, name=name)
        except QueueFull as e:
            log.info("waiting: %s", e)
        except EsperError:
            log.exception("the library did not answer")
        stop.wait(poll_seconds)
