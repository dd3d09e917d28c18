"""A world whose truth is known: what a seed is worth there depends on its family, its site and the
moment, and on luck, some of which all seeds of a run share.

Also a program, which prints how often a version is promoted where there is nothing to learn:
    python -m tests.simic.world 500
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from esper.karn.mutate import mutate
from esper.karn.templates import templates_for
from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Toolchain
from esper.leyline.command import Action, Command, FieldReport
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.leyline.shapes import infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.simic.experience import Experience, experience_of
from esper.simic.promote import judge
from esper.tamiyo.choice import Candidate
from esper.tamiyo.features import FEATURES, context_of
from esper.tamiyo.state import Catalog, SiteStatus, SystemState

SIGNATURE = SiteSignature(kind=SiteKind.MAP, channels=16)
SITES, SEEDS = 4, 6  # sites of a run, and seeds that it tries
Choose = Callable[[Sequence[Candidate], SystemState, Catalog], int]


def kernels() -> list[tuple[str, KernelRecord]]:
    """One kernel of every template for maps and of three mutants of each, with its family, which
    is the template's name."""
    found, rng = [], random.Random(0)
    graphs = templates_for(SIGNATURE)
    known = {ir.id for ir in graphs}
    for template in tuple(graphs):
        for _ in range(3):
            mutant = mutate(template, SIGNATURE, rng, known)
            assert mutant is not None
            known.add(mutant.id)
            graphs.append(mutant)
    for ir in graphs:
        shapes = infer(ir, SIGNATURE)
        manifest = Manifest(
            kernel_id=f"k-{ir.id}", blueprint_id=ir.id, signature=SIGNATURE,
            pipeline=Pipeline.FAST, backward_inputs=(), gradients=(), sha256={},
            toolchain=Toolchain(torch="2", isa="AVX2", compiler="g++", esper="0"),
            parameters=tuple(ParameterSpec(name=p.name, shape=p.shape) for p in shapes.parameters),
            compile_seconds=0, flops=shapes.flops)
        found.append((ir.name, KernelRecord(
            kernel_id=manifest.kernel_id, blueprint_id=ir.id, manifest=manifest, digest="0" * 64,
            size=1, status=KernelStatus.VALIDATED, created=0, updated=0)))
    return found


@dataclass
class World:
    """`effect` scales what family and site matter; where it is zero there is nothing to choose.

    Convolutions are good, and best at the last sites; gates are good at the first ones. Later
    seeds gain less, whichever they are.
    """

    effect: float = 1.0
    seed: int = 0
    noise: float = 0.03
    of_run: float = 0.02
    kernels: list[tuple[str, KernelRecord]] = field(default_factory=kernels)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.clock = 1.6e9
        self.regrets: list[float] = []

    def truth(self, family: str, site: int, epoch: int) -> float:
        depth = site / (SITES - 1)
        good = {"bottleneck conv": 0.03 + 0.04 * depth, "depthwise separable": 0.02 + 0.04 * depth,
                "dense conv": 0.04 + 0.04 * depth, "inverted residual": 0.01 + 0.02 * depth,
                "low rank": 0.05 - 0.06 * depth, "gated": -0.02}.get(family, 0.0)
        return 0.06 - 0.004 * epoch + self.effect * good

    def run(self, choose: Choose, known: Sequence[FieldReport] = ()) -> list[FieldReport]:
        """The reports of one run whose seeds are chosen by `choose`."""
        name = f"run-{self.random.integers(1 << 60):x}"
        luck = self.random.normal(0, self.of_run)
        reports: list[FieldReport] = []
        losses = [2.0]
        catalog = Catalog(tuple(k for _, k in self.kernels), tuple(known))
        for turn in range(SEEDS):
            epoch = 2 + 3 * turn
            sites = tuple(SiteStatus(
                f"s{i}", SIGNATURE, SeedState.DORMANT, score=float(self.random.uniform(0.2, 1)),
                fossils=turn // SITES) for i in range(SITES))
            state = SystemState(epoch, tuple(losses), tuple(losses), sites, 0, turn)
            offers = [(family, i, Candidate(sites[i], kernel, 0, None))
                      for i in range(SITES) for family, kernel in self.kernels]
            family, site, taken = offers[choose([c for *_, c in offers], state, catalog)]
            truths = [self.truth(f, i, epoch) for f, i, _ in offers]
            self.regrets.append(max(truths) - self.truth(family, site, epoch))
            worth = self.truth(family, site, epoch) + luck + self.random.normal(0, self.noise)
            self.clock += 60
            command = Command(action=Action.GERMINATE, site=taken.site.name,
                              kernel_id=taken.kernel.kernel_id, reason="")
            reports.append(FieldReport(
                run_id=name, trace_id=command.trace_id, site=taken.site.name, epochs=3,
                kernel_id=taken.kernel.kernel_id, blueprint_id=taken.kernel.blueprint_id,
                outcome=SeedState.FOSSILIZED if worth > 0 else SeedState.CULLED, reason="",
                gain=worth * losses[-1], loss_before=losses[-1], time=self.clock,
                context=context_of(command, state, catalog, None)))
            losses.append(losses[-1] * (1 - max(0.0, worth)))
            catalog = replace(catalog, reports=(*catalog.reports, reports[-1]))
        return reports

    def runs(self, count: int, choose: Choose | None = None) -> list[FieldReport]:
        """Of many runs, one after the other; chosen at random where nobody chooses."""
        found: list[FieldReport] = []
        for _ in range(count):
            found += self.run(choose or self.anything, found)
        return found

    def anything(
        self, candidates: Sequence[Candidate], state: SystemState, catalog: Catalog
    ) -> int:
        return int(self.random.integers(len(candidates)))


def renamed(experience: Experience, draw: np.random.Generator) -> Experience:
    """The same runs under other names, so that others of them are held out."""
    names = {run: f"run-{draw.integers(1 << 60):x}" for run in sorted(set(experience.runs))}
    return replace(experience, runs=tuple(names[run] for run in experience.runs))


def redrawn(experience: Experience, draw: np.random.Generator) -> Experience:
    """The same seeds in other runs, with worths that depend on nothing but moment and luck."""
    _, of_run = np.unique(np.array(experience.runs), return_inverse=True)
    epoch = np.expm1(experience.rows[:, FEATURES.index("log_epoch")])
    luck = draw.normal(0, 0.02, int(of_run.max()) + 1)[of_run]
    worth = 0.06 - 0.004 * epoch + luck + draw.normal(0, 0.03, len(experience))
    return renamed(replace(experience, worth=worth), draw)


def false_promotions(repeats: int, runs: int = 60, seed: int = 0) -> tuple[int, int]:
    """How often of `repeats` a version is promoted that is no better: the first one in a world
    where family and site matter nothing, and one that was trained on as many other runs of a world
    where they do as the one before it."""
    nothing = experience_of(World(effect=0, seed=seed).runs(runs))
    something = experience_of(World(seed=seed).runs(2 * runs))
    draw = np.random.default_rng(seed)
    first = second = 0
    for _ in range(repeats):
        experience = redrawn(nothing, draw)
        first += judge(
            1, experience.part(held=False), experience.part(held=True), None).promoted
        experience = renamed(something, draw)
        learning, held = experience.part(held=False), experience.part(held=True)
        early = set(sorted(set(learning.runs))[::2])
        one, other = (learning.only([(run in early) is half for run in learning.runs])
                      for half in (True, False))
        second += judge(2, one, held, judge(1, other, held, None)).promoted
    return first, second


def main() -> None:
    asked = int(sys.argv[1])
    for runs in (30, 60):
        first, second = false_promotions(asked, runs)
        print(f"{runs} runs: {first} of {asked} first versions promoted where there is nothing to "
              f"learn; {second} of {asked} over their equals, of {2 * runs} runs")


if __name__ == "__main__":
    main()
