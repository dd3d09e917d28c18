"""What the tests of this room share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from esper.leyline.library import BlueprintClaim
from esper.rpc.client import RemoteLibrary
from tests.urza.support import SIG, blueprint


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def claimed(library: RemoteLibrary) -> BlueprintClaim:
    library.submit(blueprint(), SIG, author="karn")
    claim = library.claim_blueprint("forge", 60)
    assert claim is not None
    return claim


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]
