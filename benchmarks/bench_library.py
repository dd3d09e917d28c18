"""Queue admission and claims: in memory (Oona, target >= 10,000 a second) and in SQLite (Urza).

The two are different things and are reported apart. Oona's queue decides in memory. Urza's
submit and claim each commit one durable transaction, so their rate hangs on the disk's fsync;
a slow track that compiles twenty blueprints an hour needs about one transaction a minute.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.blueprint import BlueprintIR, C, Node, Op, Width
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.signature import SiteKind, SiteSignature
from esper.oona.bus import Bus
from esper.oona.queue import KARN_TO_TEZZERET, LIMITS, BoundedQueue
from esper.urza.library import LocalLibrary

SIG = SiteSignature(kind=SiteKind.FEATURES, channels=8)
TARGET = ">= 10000 a second"


def blueprint(n: int) -> BlueprintIR:
    return BlueprintIR(
        kind=SiteKind.FEATURES,
        nodes=(
            Node(id="down", op=Op.LINEAR, inputs=("h",), out=Width(plus=n)),
            Node(id="up", op=Op.LINEAR, inputs=("down",), out=C),
        ),
        output="up",
    )


def rate(benchmark: Any, operations: int, what: str, target: str | None = None) -> None:
    """Note operations a second, from the median round, and print them."""
    per_second = operations / benchmark.stats.stats.median
    benchmark.extra_info.update(per_second=per_second, what=what, target=target, calls=operations)
    print(f"\n{benchmark.name}: {per_second:,.0f} {what} a second; target {target or 'none'}")


def test_admission_and_claim_in_memory(benchmark: Any) -> None:
    """Arrivals of all priorities, twice as many as claims, so the queue is soon full and every
    verdict occurs. One operation is an offer or a pop."""
    draw = random.Random(0)
    arrivals = [(draw.choice(list(Priority)), draw.random()) for _ in range(10_000)]

    def work() -> None:
        queue: BoundedQueue[int] = BoundedQueue(LIMITS[KARN_TO_TEZZERET])
        for n, (priority, interest) in enumerate(arrivals):
            queue.offer(n, priority, interest)
            if n % 2:
                queue.pop()

    benchmark.pedantic(work, rounds=20, warmup_rounds=1)
    rate(benchmark, 15_000, "offers and pops", TARGET)


def test_refusals_at_a_full_queue(benchmark: Any) -> None:
    """The overload case: nothing drains, everything is refused."""
    queue: BoundedQueue[int] = BoundedQueue(LIMITS[KARN_TO_TEZZERET])
    for n in range(LIMITS[KARN_TO_TEZZERET]):
        queue.offer(n, Priority.NORMAL)

    def work() -> None:
        for n in range(10_000):
            queue.offer(n, Priority.BACKGROUND)

    benchmark.pedantic(work, rounds=20, warmup_rounds=1)
    rate(benchmark, 10_000, "refusals", TARGET)


def test_publish_and_deliver(benchmark: Any) -> None:
    """Events through the bus, thread and all, to one handler that does nothing."""
    events = [Event(topic=Topic.EPOCH, sender="benchmark") for _ in range(5_000)]

    def work() -> None:
        bus = Bus(limit=len(events))
        bus.subscribe(Topic.EPOCH, lambda event: None)
        for event in events:
            assert bus.publish(event).accepted
        assert bus.flush(60)
        bus.close()

    benchmark.pedantic(work, rounds=10, warmup_rounds=1)
    rate(benchmark, len(events), "events delivered")


@pytest.mark.parametrize("waiting", [1, 90])
def test_submit_and_claim_in_sqlite(benchmark: Any, tmp_path: Path, waiting: int) -> None:
    """Durable submissions and claims, beside `waiting` other items; made blueprints beforehand."""
    library = LocalLibrary(tmp_path)
    irs = iter([blueprint(n) for n in range(1, 2_000)])
    for _ in range(waiting):
        library.submit(next(irs), SIG, author="benchmark", priority=Priority.BACKGROUND)

    def work() -> None:
        for _ in range(50):
            library.submit(next(irs), SIG, author="benchmark")
            assert library.claim_blueprint("benchmark", 3600) is not None

    benchmark.pedantic(work, rounds=20, warmup_rounds=1)
    rate(benchmark, 100, f"durable submissions and claims, {waiting} waiting,")


def test_query_in_sqlite(benchmark: Any, tmp_path: Path) -> None:
    """All 100 blueprints of a signature, parsed into records."""
    library = LocalLibrary(tmp_path)
    for n in range(1, 101):
        library.submit(blueprint(n), SIG, author="benchmark")
    found = benchmark.pedantic(lambda: library.blueprints(SIG), rounds=20, warmup_rounds=1)
    assert len(found) == 100
    rate(benchmark, 100, "records read")
