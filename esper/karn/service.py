"""Karn's loop: keep a few blueprints waiting for every signature somebody asked for."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Sequence

from esper.errors import EsperError, QueueFull
from esper.karn.families import Stock, stock_of
from esper.karn.mutate import mutate
from esper.karn.novelty import bag, novelty
from esper.karn.templates import templates_for
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.command import FieldReport
from esper.leyline.events import Priority
from esper.leyline.library import HIGH_INTEREST, BlueprintRecord, Library
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.signature import SiteSignature

log = logging.getLogger(__name__)
EXPLORATION = 0.25  # share of parents from a family drawn at random, so that none takes over
TOURNAMENT = 3  # candidates per parent; the most promising is taken
LITTER = 4  # mutants per submission; the one most unlike what is on offer is taken
# Distinct families on offer per signature, as far as there are so many: below it, the next
# mutant is bred from a family that has nothing on offer.
FAMILY_FLOOR = 3
TEMPLATE_INTEREST = 0.6
INHERITED = 0.9  # share of a parent's interest that its mutant is submitted with
# Blueprints for one signature that may be on their way to a trainer or at its disposal, and that
# no seed has tried. More would be invented without evidence, and would keep Tezzeret from making
# better kernels of what has shown its worth, which he does when nothing new waits.
UNTRIED = 8


def _parent(stock: Stock, rng: random.Random) -> BlueprintRecord | None:
    """Whom to breed from: of the family floor's, at random, or what earned its keep."""
    sound = [[m for m in family.members if m.status is not BlueprintStatus.INVALID]
             for family in stock.families]
    living = [(family, members) for family, members in zip(stock.families, sound, strict=True)
              if members]
    if not living:
        return None
    silent = [members for family, members in living if not family.offered]
    if silent and len(living) - len(silent) < FAMILY_FLOOR:
        return rng.choice(rng.choice(silent))
    if rng.random() < EXPLORATION:
        return rng.choice(rng.choice([members for _, members in living]))
    everyone = [m for _, members in living for m in members]
    contenders = [rng.choice(everyone) for _ in range(TOURNAMENT)]
    return max(contenders, key=lambda b: stock.promise(b.blueprint_id))


def _mutant(parent: BlueprintRecord, stock: Stock, rng: random.Random) -> BlueprintIR | None:
    """Of a litter, the one most unlike what is on offer; None where nothing new came to mind."""
    ids = {b.blueprint_id for b in stock.blueprints}
    litter = [m for _ in range(LITTER)
              if (m := mutate(parent.ir, stock.signature, rng, ids)) is not None]
    on_offer = stock.offered
    offered = [bag(b.ir) for b in stock.blueprints if b.blueprint_id in on_offer]
    return max(litter, key=lambda m: novelty(bag(m), offered) or 0.0, default=None)


def invent(
    library: Library, signature: SiteSignature, rng: random.Random, name: str,
    reports: Sequence[FieldReport] | None = None,
) -> bool:
    """Submit one new blueprint for `signature`; False where nothing new came to mind. `reports`
    are the library's, read here where they are not given.

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
    stock = stock_of(signature, known, library.kernels(signature=signature),
                     library.reports() if reports is None else reports)
    parent = _parent(stock, rng)
    mutant = _mutant(parent, stock, rng) if parent is not None else None
    if parent is None or mutant is None:
        return False
    proven = parent.interest > HIGH_INTEREST
    library.submit(mutant, signature, author=f"{name}/mutant",
                   interest=INHERITED * parent.interest,
                   priority=Priority.NORMAL if proven else Priority.EXPERIMENTAL,
                   parents=(parent.blueprint_id,))
    return True


def why_silent(stock: Stock) -> str:
    """Why nothing new is invented for a signature, "" where something is."""
    if len(stock.untried) < UNTRIED:
        return ""
    return (f"{len(stock.untried)} blueprints for {stock.signature} have not been tried by any "
            f"seed, and {UNTRIED} are enough; more are invented as field reports come in")


class Silence:
    """Says once why nothing is invented for a signature, and once when that is over."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def say(self, stock: Stock) -> None:
        reason = why_silent(stock)
        before = self._said.get(stock.signature.id, "")
        if bool(reason) != bool(before):
            log.info("%s", reason or f"reports came in: inventing for {stock.signature} again")
        self._said[stock.signature.id] = reason


def keep_waiting(
    library: Library, stop: threading.Event, rng: random.Random, *, target_depth: int,
    name: str = "karn", silence: Silence | None = None,
) -> None:
    """Submit until `target_depth` blueprints wait for every signature, or `UNTRIED` are untried.

    The depth is multiplied by the library's capacity factor and rounded down, so that Karn
    gives way early and offers nothing new to a queue that is all but full.

    Raises:
        QueueFull: the library has enough to do.
    """
    wanted = math.floor(target_depth * library.capacity())
    reports = library.reports()
    for signature in library.signatures():
        known = library.blueprints(signature)
        waiting = sum(b.status is BlueprintStatus.UNVALIDATED for b in known)
        stock = stock_of(signature, known, library.kernels(signature=signature), reports)
        if silence is not None:
            silence.say(stock)
        for _ in range(min(wanted - waiting, UNTRIED - len(stock.untried))):
            if stop.is_set() or not invent(library, signature, rng, name, reports):
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
    rng, silence = random.Random(seed), Silence()
    while not stop.is_set():
        started = time.monotonic()
        try:
            keep_waiting(library, stop, rng, target_depth=target_depth, name=name,
                         silence=silence)
        except QueueFull as e:
            log.info("waiting: %s", e)
        except EsperError:
            log.exception("the library did not answer")
        stop.wait(max(poll_seconds, 10 * (time.monotonic() - started)))
