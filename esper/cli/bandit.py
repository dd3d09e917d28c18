"""The bandit of a run: which version chooses, and where there is none."""

from __future__ import annotations

from esper.leyline.library import Library
from esper.simic.versions import Versions
from esper.tamiyo.bandit import Bandit
from esper.urza.library import LocalLibrary

HEURISTIC = "heuristic"


def bandit_of(
    library: Library, seed: int, before: str | None = None
) -> tuple[Bandit | None, str]:
    """The version of a library that is to choose, None where the heuristic has to, and what to
    tell the user. `before` is the version that a resumed run began with ("heuristic" where it
    began with none): it goes on with that one, whatever was promoted since.

    Raises:
        LibraryError: the library's versions cannot be read, or that one is gone.
    """
    if before == HEURISTIC:
        return None, "the heuristic chooses, as it did before the run was interrupted"
    if not isinstance(library, LocalLibrary):
        return None, ("policy kind bandit: versions are kept in a library's folder, and this run "
                      "has an address; the heuristic chooses")
    versions = Versions(library.root)
    version = versions.named(before) if before is not None else versions.promoted()
    if version is None:
        return None, (f"policy kind bandit: no version is promoted in {library.root}; the "
                      "heuristic chooses. Train one: esper simic train")
    return Bandit(version.model, version.name, seed), (
        f"{version.name} chooses, trained on {version.reports} reports of {version.runs} runs")
