"""`esper library archive` and `check`: taking things out of use, and looking for damage."""

from __future__ import annotations

import hashlib

from rich.console import Console

from esper.cli.library import find
from esper.errors import EsperError, IllegalTransition
from esper.leyline.library import BlueprintRecord, KeptLibrary
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.urza.library import LocalLibrary


def archive(library: KeptLibrary, console: Console, wanted: str, reason: str) -> None:
    """Take a blueprint out for good, for every signature it was queued for, or a kernel: a
    kernel goes from VALIDATED by way of QUARANTINED to RETIRED. Nothing is deleted.

    Raises:
        NotInLibrary: no id starts so, or several do.
        IllegalTransition: it is archived already, or in a state that does not end so.
    """
    record = find(library, wanted)
    if isinstance(record, BlueprintRecord):
        every = [b for b in library.blueprints() if b.blueprint_id == record.blueprint_id]
        open_ones = [b for b in every if b.status is not BlueprintStatus.ARCHIVED]
        if not open_ones:
            raise IllegalTransition(f"blueprint {record.blueprint_id} is ARCHIVED already")
        for b in open_ones:
            library.archive(b.blueprint_id, b.signature, reason)
            console.print(f"{b.blueprint_id} for {b.signature}: {b.status} -> ARCHIVED",
                          highlight=False)
        return
    if record.status is KernelStatus.RETIRED:
        raise IllegalTransition(f"kernel {record.kernel_id} is RETIRED already")
    if record.status is KernelStatus.VALIDATED:
        library.quarantine(record.kernel_id, reason)
    library.retire(record.kernel_id, reason)
    console.print(f"{record.kernel_id}: {record.status} -> RETIRED", highlight=False)


def check(library: LocalLibrary, console: Console) -> int:
    """Read every artifact and compare it with its record; returns 1 where one is damaged.

    A blob that no kernel names is reported and left alone: a crash between blob and record
    leaves one, and one that is being stored right now looks the same.
    """
    kernels = library.kernels()
    damaged = 0
    for k in kernels:
        try:
            with open(library.fetch(k.digest), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            problem = "" if found == k.digest else f"its file has digest {found}"
        except (EsperError, OSError) as e:
            problem = str(e)
        if problem:
            damaged += 1
            console.print(f"damaged: {k.kernel_id} ({k.status}), blob {k.digest}: {problem}",
                          style="red", highlight=False, markup=False)
    orphans = sorted(library.orphans())
    for digest in orphans:
        size = library.fetch(digest).stat().st_size
        console.print(f"orphan: blob {digest}, {size:,} bytes: no kernel names it",
                      highlight=False, markup=False)
    console.print(f"{len(kernels)} kernels, {damaged} damaged; {len(orphans)} orphaned blobs",
                  highlight=False)
    return int(damaged > 0)
