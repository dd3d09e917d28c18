"""`esper library lineage`: who descends from what, and how each fared in the field."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from esper.cli.families import gain
from esper.cli.library import find, short
from esper.leyline.command import FieldReport
from esper.leyline.evidence import earned, worth
from esper.leyline.library import BlueprintRecord, KernelRecord, Library
from esper.leyline.lifecycle import KernelStatus


class Family:
    """All blueprints of a library by descent, with what became of their kernels."""

    def __init__(self, library: Library) -> None:
        self._names: dict[str, str] = {}
        self.parents: dict[str, list[str]] = defaultdict(list)
        self.children: dict[str, list[str]] = defaultdict(list)
        self._reports: dict[str, list[FieldReport]] = defaultdict(list)
        self._kernels: dict[str, list[KernelRecord]] = defaultdict(list)
        for b in reversed(library.blueprints()):  # oldest first
            self._names[b.blueprint_id] = b.ir.name
            for parent in b.parents:
                if parent not in self.parents[b.blueprint_id]:
                    self.parents[b.blueprint_id].append(parent)
                    self.children[parent].append(b.blueprint_id)
        for report in library.reports():
            self._reports[report.blueprint_id].append(report)
        for kernel in library.kernels():
            self._kernels[kernel.blueprint_id].append(kernel)

    def line(self, blueprint_id: str) -> Text:
        """One blueprint: name, kernels, outcomes. What is not known is said to be so."""
        name = self._names.get(blueprint_id)
        text = Text(short(blueprint_id), style="bold")
        text.append(f"  {name or ('unnamed' if name is not None else 'not in this library')}")
        kernels = self._kernels[blueprint_id]
        if kernels:
            valid = sum(k.status is KernelStatus.VALIDATED for k in kernels)
            text.append(f"  {valid} of {len(kernels)} kernels VALIDATED", style="dim")
        return text.append(f"  {outcomes(self._reports[blueprint_id])}")

    def tree(self, top: str, of: Mapping[str, Iterable[str]], tree: Tree) -> Tree:
        """Hang everything that `of` leads to from `top`; who was shown is not unfolded again."""
        shown = {top}

        def hang(below: Tree, blueprint_id: str) -> None:
            for each in of.get(blueprint_id, ()):
                again = each in shown
                branch = below.add(self.line(each).append("  (see above)" if again else ""))
                if not again:
                    shown.add(each)
                    hang(branch, each)

        hang(tree, top)
        return tree


def outcomes(reports: list[FieldReport]) -> str:
    """How often each end came, and what was earned where reports say so."""
    if not reports:
        return "never in the field"
    counts = Counter(r.outcome for r in reports)
    parts = [f"{n} {outcome}" for outcome, n in counts.most_common()]
    worths = [w for r in reports if (w := worth(r)) is not None]
    measured = gain(earned(worths)) if worths else "no gain measured"
    return f"{', '.join(parts)}; {measured}"


def show_lineage(library: Library, console: Console, wanted: str) -> None:
    """Print the ancestors and the descendants of a blueprint, or of a kernel's blueprint.

    Raises:
        NotInLibrary: no id starts so, or several do.
    """
    record: BlueprintRecord | KernelRecord = find(library, wanted)
    family, top = Family(library), record.blueprint_id
    console.print(family.line(top))
    for heading, of in (("descends from", family.parents), ("descendants", family.children)):
        if of[top]:
            console.print(family.tree(top, of, Tree(heading, guide_style="dim")))
        else:
            console.print(f"{heading}: none", highlight=False)
