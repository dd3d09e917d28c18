"""Karn learns: parents that can be relied on, families that do not die out, and the report."""

from __future__ import annotations

import io
import logging
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from esper.cli.families import show_families
from esper.karn import service
from esper.karn.families import Stock, stocks
from esper.karn.mutate import mutate
from esper.karn.novelty import bag, distance, novelty
from esper.karn.templates import templates_for
from esper.leyline.blueprint import BlueprintIR, Node
from esper.leyline.command import FieldReport
from esper.leyline.library import KernelRecord
from esper.leyline.lifecycle import SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.urza.library import LocalLibrary
from tests.karn.test_karn import proven

SIGNATURE = SiteSignature(kind=SiteKind.MAP, channels=12)


def renamed(ir: BlueprintIR) -> BlueprintIR:
    names = {n.id: f"other{i}" for i, n in enumerate(ir.nodes)}
    nodes = tuple(Node.model_validate({
        **n.model_dump(exclude_none=True), "id": names[n.id],
        "inputs": tuple(names.get(i, i) for i in n.inputs)}) for n in ir.nodes)
    return BlueprintIR(kind=ir.kind, name="another name", nodes=nodes, output=names[ir.output])


def test_distance_is_a_metric_of_structure_and_a_mutant_is_near_its_parent() -> None:
    templates, rng = templates_for(SIGNATURE), random.Random(0)
    bags = {ir.name: bag(ir) for ir in templates}
    for ir in templates:
        assert distance(bag(renamed(ir)), bags[ir.name]) == 0, "names are no structure"
        mutant = mutate(ir, SIGNATURE, rng, {ir.id})
        assert mutant is not None
        to_kin = distance(bag(mutant), bags[ir.name])
        strangers = [distance(bag(mutant), b) for n, b in bags.items() if n != ir.name]
        assert 0 < to_kin < sum(strangers) / len(strangers)
    for a in bags.values():
        for b in bags.values():
            assert 0 <= distance(a, b) == distance(b, a) <= 1
            assert all(distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12
                       for c in bags.values())
    first, *others = bags.values()
    assert novelty(first, []) is None and novelty(first, [first]) == 0
    assert novelty(first, others) == sum(sorted(distance(first, b) for b in others)[:3]) / 3


def field_report(kernel: KernelRecord, share: float, run: int = 0) -> FieldReport:
    return FieldReport(
        run_id=f"run-{run}", trace_id="t", site="s", kernel_id=kernel.kernel_id, epochs=5,
        blueprint_id=kernel.blueprint_id, reason="test", gain=2 * share, loss_before=2.0,
        outcome=SeedState.FOSSILIZED if share > 0 else SeedState.CULLED)


def grown_library(folder: Path) -> tuple[LocalLibrary, dict[str, KernelRecord]]:
    """Every template for maps, proven; kernels by the name of their template."""
    library, found = LocalLibrary(folder), {}
    library.register_signature(SIGNATURE)
    for ir in templates_for(SIGNATURE):
        library.submit(ir, SIGNATURE, author="karn/template", interest=0.6)
        found[ir.name] = proven(library)
    return library, found


def parents(stock: Stock, draws: int = 400) -> Counter[str]:
    rng = random.Random(0)
    drawn = (service._parent(stock, rng) for _ in range(draws))
    return Counter(p.ir.name for p in drawn if p is not None)


def test_parents_are_those_that_can_be_relied_on(tmp_path: Path) -> None:
    library, kernels = grown_library(tmp_path)
    for run in range(6):
        library.add_report(field_report(kernels["low rank"], 0.05 + 0.004 * run, run))
        library.add_report(field_report(kernels["dense conv"], -0.05, run))
        library.add_report(field_report(kernels["gated"], 0.0, run))
    library.add_report(field_report(kernels["bottleneck"], 0.3))
    (stock,) = stocks(library)
    promised = {name: stock.promise(k.blueprint_id) for name, k in kernels.items()}
    assert promised["low rank"] > 0 > promised["dense conv"]
    assert promised["bottleneck"] == promised["squeeze excite"] == promised["gated"] == 0, (
        "one lucky report, none, or many of nothing: nothing to rely on")
    drawn = parents(stock)
    assert drawn["low rank"] == max(drawn.values()) > 1.5 * drawn["bottleneck"]
    assert drawn["dense conv"] == min(drawn.values()) > 0, "every family gets its turn"
    assert stock.best is not None and stock.best.ir.name == "low rank"


def test_no_family_takes_over(tmp_path: Path) -> None:
    """Where all but one family has lost what it had on offer, the next ones are bred from others,
    though all evidence speaks for the one."""
    library, kernels = grown_library(tmp_path)
    for run in range(6):
        library.add_report(field_report(kernels["low rank"], 0.2, run))
    for name, kernel in kernels.items():
        if name != "low rank":
            library.quarantine(kernel.kernel_id, "NaN in the field")
    (before,) = stocks(library)
    assert [f.name for f in before.families if f.offered] == ["low rank"]
    rng = random.Random(1)
    for _ in range(service.FAMILY_FLOOR - 1):
        assert service.invent(library, SIGNATURE, rng, "karn")
    (after,) = stocks(library)
    alive = {f.name for f in after.families if f.offered}
    assert len(alive) == service.FAMILY_FLOOR and "low rank" in alive
    assert len(after.families) == len(kernels), "mutants belong to the family of their founder"


def test_karn_says_once_why_he_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library, kernels = grown_library(tmp_path)
    silence = service.Silence()

    def look() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "esper.karn.service"):
            service.keep_waiting(library, threading.Event(), random.Random(0), target_depth=1,
                                 silence=silence)
        return [r.getMessage() for r in caplog.records]

    (said,) = look()
    assert "8 blueprints for map[12]" in said and "more are invented as field reports" in said
    assert not look()
    library.add_report(field_report(kernels["gated"], 0.1))
    (said,) = look()
    assert "reports came in" in said and library.depths().karn_to_tezzeret == 1


def test_the_report_shows_what_was_earned_and_the_line_of_the_best(tmp_path: Path) -> None:
    library, kernels = grown_library(tmp_path / "library")
    for run in range(6):
        library.add_report(field_report(kernels["low rank"], 0.05, run))
    parent = next(b for b in library.blueprints() if b.ir.name == "low rank")
    child = mutate(parent.ir, SIGNATURE, random.Random(0), {parent.blueprint_id})
    assert child is not None
    library.submit(child, SIGNATURE, author="karn/mutant", parents=(parent.blueprint_id,))
    kernel = proven(library)
    for run in range(6):
        library.add_report(field_report(kernel, 0.1, run))
    page = tmp_path / "families.html"
    out = io.StringIO()
    show_families(library, Console(file=out, width=200), "map", page)
    text = out.getvalue()
    assert "9 blueprints in 8 families; 9 on offer, from 8 families (floor 3)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("low rank"))
    assert row.split()[2:6] == ["2", "2", "22%", "12"] and "+7.5%" in row
    line = text[text.index("the best"):].splitlines()
    assert line[1].startswith(f"  low rank {parent.blueprint_id[:14]}: +5.0% of the loss in 6")
    assert f"└─ low rank {child.id[:14]}: +10.0%" in line[2]
    html = page.read_text()
    assert child.id[:14] in html and html.count("<details>") == 8 and "<svg" in html
