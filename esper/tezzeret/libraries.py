"""Two shared libraries of a blueprint, by Inductor: both halves of each variant, and the fastest.

Runs in a child of the forge, and in children of that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import EsperError
from esper.leyline.artifact import BACKWARD, FORWARD
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.sandbox.allowance import in_force
from esper.tezzeret.backends import Built
from esper.tezzeret.children import NothingBuilt, in_children
from esper.tezzeret.pipelines import Recipe

if TYPE_CHECKING:  # torch is imported where something is built, not by those who have it built
    from esper.tezzeret.contest import Build

CLEARLY = 0.97  # of the first variant's time; less is within the noise of so short a comparison


def _library(half: Any, options: dict[str, Any], target: Path) -> None:
    """Compile one half to a shared library at `target`; runs in a child of its own."""
    import torch

    with contextlib.redirect_stdout(sys.stderr):
        program = half.export()
        made = torch._inductor.aot_compile(
            program.module(check_guards=False), program.example_inputs[0], options=options
        )
    if not isinstance(made, str):
        raise TypeError(f"expected the path of a shared library, Inductor gave {made!r}")
    # Symbols that only a debugger reads are a third of the file, and opening reads it all.
    if (strip := shutil.which("strip")) is not None:
        subprocess.run([strip, "--strip-unneeded", made], check=True, timeout=60)
    os.replace(made, target)


def _build(lowered: Any, options: dict[str, Any], folder: Path) -> str:
    """Both halves of one variant, at the same time; the error or ""."""
    folder.mkdir()
    return in_children({
        name: partial(_library, half, options, folder / f"{name}.so")
        for name, half in (("forward", lowered.forward), ("backward", lowered.backward))
    }, folder, in_force())


def _fastest(signature: SiteSignature, builds: list[Build]) -> Build:
    """The first, or another that is clearly faster; each is compared in a fresh child."""
    best, least = builds[0], CLEARLY
    for build in builds[1:]:
        result = build.folder / "ratio"

        def work(build: Build = build, result: Path = result) -> None:
            from esper.tezzeret.contest import ratio

            result.write_text(repr(ratio(signature, builds[0], build)))

        if error := in_children({"timing": work}, build.folder, in_force()):
            _say(f"{build.name}: not to be timed: {error.strip().splitlines()[0]}")
            continue
        found = float(result.read_text())
        _say(f"{build.name}: {found:.3f} times the time of {builds[0].name}")
        if found < least:
            best, least = build, found
    return best


def _say(words: str) -> None:
    print(f"forge: {words}", file=sys.stderr, flush=True)


def _builds(
    ir: BlueprintIR, signature: SiteSignature, recipe: Recipe, folder: Path
) -> list[Build]:
    """Every variant of a recipe that can be built; those that come to the same code once.

    Raises:
        NothingBuilt: there is none, with what went wrong in each.
    """
    from esper.tezzeret.contest import Build
    from esper.tezzeret.lower import lower

    builds: list[Build] = []
    errors: list[str] = []
    seen: set[str] = set()
    for index, variant in enumerate(recipe.variants):
        place = folder / f"variant{index}"
        options = {**recipe.options, **variant.options}
        try:
            lowered = lower(ir, signature, spelled_out=variant.spells_out(ir))
        except EsperError as e:
            errors.append(f"variant {variant.name!r}: {e}")
            continue
        code = repr((lowered.code, sorted(options.items())))
        if code in seen:
            continue
        seen.add(code)
        if error := _build(lowered, options, place):
            errors.append(f"variant {variant.name!r}: {error}" if len(recipe.variants) > 1
                          else error)
        else:
            builds.append(Build(variant.name, lowered, place))
    if not builds:
        raise NothingBuilt("\n".join(errors))
    return builds


def build_libraries(
    ir: BlueprintIR, signature: SiteSignature, recipe: Recipe, folder: Path
) -> Built:
    """Lower a blueprint and compile both halves by Inductor; of a recipe's variants the fastest."""
    best = _fastest(signature, _builds(ir, signature, recipe, folder))
    return Built(best.lowered.backward_inputs, best.lowered.gradients,
                 {name: (best.folder / name).read_bytes() for name in (FORWARD, BACKWARD)})
