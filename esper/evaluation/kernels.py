"""The kernels of an experiment: made once by the real services, and copied for every run.

A run that is given what earlier runs have reported would depend on which of them were over. So
each starts from the same library, without a report in it; what it learns, it learns by itself.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esper.errors import EsperError
from esper.karn.mutate import mutate
from esper.karn.templates import templates_for
from esper.leyline.artifact import Pipeline
from esper.leyline.base import canonical_json, content_id
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature
from esper.tezzeret import service as tezzeret
from esper.tezzeret.toolchain import toolchain
from esper.tezzeret.worker import Forge
from esper.urabrask import service as urabrask
from esper.urza.library import LocalLibrary

WORKER = "evaluate"
LEASE_SECONDS = 120.0
POLL_SECONDS = 0.5
_SETTLED = (BlueprintStatus.COMPILED, BlueprintStatus.INVALID, BlueprintStatus.ARCHIVED)
_JUDGED = (KernelStatus.VALIDATED, KernelStatus.REJECTED, KernelStatus.RETIRED,
           KernelStatus.QUARANTINED)


@dataclass(frozen=True)
class Recipe:
    """What is in a library: Karn's templates for the signatures, and `mutants` of them each."""

    signatures: tuple[SiteSignature, ...]
    mutants: int
    seed: int
    pipeline: Pipeline

    @property
    def id(self) -> str:
        """Of the recipe on this machine's toolchain, for kernels are made for one."""
        words = [s.model_dump(mode="json") for s in self.signatures]
        tools = toolchain().model_dump(mode="json")
        return content_id("kernels", canonical_json(
            [words, self.mutants, self.seed, str(self.pipeline), tools]))

    def blueprints(self) -> list[tuple[BlueprintIR, SiteSignature, tuple[str, ...]]]:
        """(blueprint, signature, its parents)."""
        made: list[tuple[BlueprintIR, SiteSignature, tuple[str, ...]]] = []
        for signature in self.signatures:
            rng = random.Random(self.seed)
            templates = templates_for(signature)
            known = {ir.id for ir in templates}
            made += [(ir, signature, ()) for ir in templates]
            for i in range(self.mutants):
                parent = templates[i % len(templates)]
                mutant = mutate(parent, signature, rng, known)
                if mutant is not None:
                    known.add(mutant.id)
                    made.append((mutant, signature, (parent.id,)))
        return made


@dataclass(frozen=True)
class Made:
    """What became of the recipe's blueprints. Seconds are those of compilers and of verdicts: wall
    time, and no FLOPs of any arm."""

    validated: int
    refused: tuple[str, ...]
    compile_seconds: float
    verdict_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prepare(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Made:
    """Compile and prove what the recipe names and the library in `folder` does not have yet.

    Raises:
        CompileError: there is no working compiler.
        EsperError: not one kernel could be proved.
    """
    library = LocalLibrary(folder)
    for signature in recipe.signatures:
        library.register_signature(signature)
    wanted = recipe.blueprints()
    for ir, signature, parents in wanted:
        library.submit(ir, signature, author=WORKER, parents=parents, pipeline=recipe.pipeline)
    never, told = threading.Event(), [-1]

    def progress() -> None:
        done = sum(k.status in _JUDGED for k in library.kernels())
        done += sum(b.status is BlueprintStatus.INVALID for b in library.blueprints())
        if done != told[0]:
            told[0] = done
            say(f"kernels: {done} of {len(wanted)}")

    with Forge() as forge:
        while any(b.status not in _SETTLED for b in library.blueprints()):
            claim = library.claim_blueprint(WORKER, LEASE_SECONDS)
            if claim is None:  # another evaluation has it in hand
                time.sleep(POLL_SECONDS)
                continue
            try:
                tezzeret.carry(library, claim, forge, never, recipe.pipeline, LEASE_SECONDS)
            except EsperError:
                with contextlib.suppress(EsperError):
                    library.release(claim)
                raise
            _prove_waiting(library, never)
            progress()
    while any(k.status not in _JUDGED for k in library.kernels()):
        if not _prove_waiting(library, never):
            time.sleep(POLL_SECONDS)
        progress()
    made = look(library)
    library.close()
    if not made.validated:
        raise EsperError(f"no kernel could be proved of {len(wanted)}: {'; '.join(made.refused)}")
    return made


def _prove_waiting(library: LocalLibrary, never: threading.Event) -> int:
    done = 0
    while (claim := library.claim_kernel(WORKER, LEASE_SECONDS)) is not None:
        done += urabrask.handle(library, claim, never)
    return done


def look(library: LocalLibrary) -> Made:
    """What a library holds."""
    kernels, blueprints = library.kernels(), library.blueprints()
    refused = [f"{b.ir.name}: {b.reason}" for b in blueprints
               if b.status is BlueprintStatus.INVALID]
    names = {b.blueprint_id: b.ir.name for b in blueprints}
    refused += [f"{names[k.blueprint_id]}, {k.kernel_id}: {k.reason}" for k in kernels
                if k.status is not KernelStatus.VALIDATED]
    return Made(
        validated=sum(k.status is KernelStatus.VALIDATED for k in kernels),
        refused=tuple(r.strip().splitlines()[0] for r in refused),
        compile_seconds=sum(k.manifest.compile_seconds for k in kernels),
        verdict_seconds=sum(k.report.seconds for k in kernels if k.report is not None),
    )


def copy_library(source: Path, target: Path) -> Path:
    """A library of its own in `target`, with the kernels of `source`; returns `target`.

    Blobs are linked where the file system can do that: nobody writes to a blob.
    """
    target.mkdir(parents=True)
    with (contextlib.closing(sqlite3.connect(source / "library.db")) as old,
          contextlib.closing(sqlite3.connect(target / "library.db")) as new):
        old.backup(new)
    for blob in _blobs(source / "blobs"):
        copy = target / "blobs" / blob.relative_to(source / "blobs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blob, copy)
        except OSError:
            shutil.copy2(blob, copy)
    return target


def _blobs(folder: Path) -> Iterable[Path]:
    return (p for p in folder.glob("[0-9a-f][0-9a-f]/*") if p.is_file())
