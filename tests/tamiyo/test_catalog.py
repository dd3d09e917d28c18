"""The watch sees what changes, and does not read what has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper.leyline.library import KernelRecord
from esper.tamiyo.catalog import CatalogWatch
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, artifact, blueprint, report


def validated(library: LocalLibrary, n: int) -> KernelRecord:
    library.submit(blueprint(n), SIG, author="karn")
    claim = library.claim_blueprint("forge", 60)
    assert claim is not None
    library.complete_blueprint(claim, artifact(claim.record.ir))
    work = library.claim_kernel("bench", 60)
    assert work is not None
    return library.complete_kernel(work, report(work.record.kernel_id))


def test_kernels_are_read_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = LocalLibrary(tmp_path)
    first = validated(library, 1)
    reads: list[Any] = []
    kernels = library.kernels

    def counted(**query: Any) -> list[KernelRecord]:
        reads.append(query)
        return kernels(**query)

    monkeypatch.setattr(library, "kernels", counted)
    watch = CatalogWatch(library, [SIG], period=3600)
    watch.close()  # from now on it looks when it is told to
    assert watch.refresh().kernels == (first,)
    reads.clear()
    assert watch.refresh().kernels == (first,) and not reads
    graphs = watch.current.blueprints
    assert {b: ir.id for b, ir in graphs.items()} == {first.blueprint_id: first.blueprint_id}
    second = validated(library, 2)
    found = watch.refresh()
    assert found.kernels == (second, first) and len(reads) == 1
    assert found.blueprints.keys() == {first.blueprint_id, second.blueprint_id}
    assert found.depths == library.depths() and found.capacity == 1.0
    library.quarantine(first.kernel_id, "NaN")
    assert watch.refresh().kernels == (second,) and len(reads) == 2
