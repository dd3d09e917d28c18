"""The library's queue on rows of its database and the queue that is simulated are one policy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from esper.errors import QueueFull
from esper.leyline.events import Priority
from esper.leyline.lifecycle import BlueprintStatus
from esper.oona.queue import LIMITS, BoundedQueue, lifted
from esper.urza import queues
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, Clock, blueprint

LIMIT = 6


@pytest.mark.parametrize("seed", range(4))
def test_the_library_decides_as_the_simulated_queue_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(queues, "LIMITS", {**LIMITS, "karn_to_tezzeret": LIMIT})
    clock, draw = Clock(), random.Random(seed)
    library = LocalLibrary(tmp_path, clock)
    queue: BoundedQueue[str] = BoundedQueue(LIMIT, clock)
    told = {"refused": 0, "dropped": 0, "claimed": 0}
    for n in range(1, 120):
        clock.now += draw.choice([1, 10, 120])
        if draw.random() < 0.7:
            ir, priority = blueprint(n), draw.choice(list(Priority))
            interest = draw.choice([0.1, 0.5, 0.9])
            admission = queue.offer(ir.id, lifted(priority, interest), interest)
            told["refused"] += not admission.accepted
            told["dropped"] += admission.dropped is not None
            if admission.accepted:
                library.submit(ir, SIG, author="test", priority=priority, interest=interest)
            else:
                with pytest.raises(QueueFull):
                    library.submit(ir, SIG, author="test", priority=priority, interest=interest)
            if admission.dropped is not None:
                status = {b.blueprint_id: b.status for b in library.blueprints()}
                assert status[admission.dropped] is BlueprintStatus.ARCHIVED
        else:
            claim, first = library.claim_blueprint("w", 1e6), queue.pop()
            assert (claim.record.blueprint_id if claim else None) == first
            told["claimed"] += first is not None
        assert library.depths().karn_to_tezzeret == len(queue)
    assert min(told.values()) >= 5, told
