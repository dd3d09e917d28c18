"""Events in the library: there with the fact or not at all, and kept until they are dealt with."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.errors import ContractError, NotInLibrary, QueueFull
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.payloads import payload_of
from esper.urza import outbox
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, Clock, artifact, blueprint

ALL: frozenset[Topic] = frozenset()


def event(n: int, priority: Priority = Priority.NORMAL, topic: Topic = Topic.EPOCH) -> Event:
    return Event(event_id=f"ev-{n}", topic=topic, sender="test", priority=priority)


def drained(library: LocalLibrary, name: str) -> list[str]:
    seen = []
    while (found := library.next_event(name)) is not None:
        assert library.next_event(name) == found, "until it is acknowledged it is the next one"
        library.acknowledge(name, found.event_id)
        seen.append(found.event_id)
    return seen


def stored(library: LocalLibrary) -> int:
    with library._store.read() as con:
        return int(con.execute("SELECT count(*) FROM outbox").fetchone()[0])


def test_each_subscriber_gets_what_he_asked_for_the_most_urgent_first(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.publish(event(0))
    assert not stored(library), "nobody listened"
    library.subscribe("all", ALL)
    library.subscribe("rollbacks", frozenset({Topic.ROLLBACK}))
    library.publish(event(1))
    library.publish(event(2, Priority.EMERGENCY, Topic.ROLLBACK))
    library.publish(event(2, Priority.EMERGENCY, Topic.ROLLBACK))  # sent again: IDEMPOTENT
    library.publish(event(3, Priority.STRATEGIC))
    library.subscribe("all", ALL)  # opened again: nothing is lost by that
    again = LocalLibrary(tmp_path)
    assert drained(again, "all") == ["ev-2", "ev-3", "ev-1"]
    assert stored(library) == 1 and drained(library, "rollbacks") == ["ev-2"]
    assert not stored(library)
    library.acknowledge("all", "ev-2")
    library.subscribe("all", frozenset({Topic.CAPACITY}))  # other topics: another subscription
    library.publish(event(5))
    assert drained(library, "all") == []
    with pytest.raises(NotInLibrary, match="subscribe again"):
        library.next_event("nobody")


def test_a_fact_that_is_not_written_is_not_announced(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.subscribe("all", ALL)
    for n in range(100):
        library.submit(blueprint(n + 1), SIG, author="karn")
    with pytest.raises(QueueFull):
        library.submit(blueprint(200), SIG, author="karn")
    library.submit(blueprint(1), SIG, author="karn")  # there already
    assert len(drained(library, "all")) == 100
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    library.release(claim)
    claim = library.claim_blueprint("w", 60)
    assert claim is not None
    kernel = library.complete_blueprint(claim, artifact(claim.record.ir))
    ready = library.next_event("all")
    assert ready is not None and ready.topic is Topic.KERNEL_READY
    assert payload_of(ready) == kernel and ready.time == kernel.created


def test_only_true_facts_and_sound_bodies_are_published(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    for topic in (Topic.FIELD_REPORTS, Topic.BLUEPRINT_SUBMITTED, Topic.KERNEL_READY,
                  Topic.KERNEL_CHARACTERIZED):
        with pytest.raises(ContractError, match="says itself"):
            library.publish(event(1, topic=topic))
    with pytest.raises(ContractError, match="is no SeedHealth"):
        library.publish(event(1, topic=Topic.SEED_HEALTH))
    long = event(1).model_copy(update={"body": {"words": "x" * outbox.MAX_EVENT_CHARS}})
    with pytest.raises(ContractError, match="say less"):
        library.publish(long)
    for name in ("", "x" * 201):
        with pytest.raises(ContractError, match="1 to 200 characters"):
            library.subscribe(name, ALL)


def test_who_stays_away_is_forgotten_and_what_is_too_much_is_dropped_by_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "KEPT_EVENTS", 3)
    monkeypatch.setattr(outbox, "MAX_SUBSCRIPTIONS", 2)
    clock = Clock()
    library = LocalLibrary(tmp_path, clock)
    library.subscribe("slow", ALL)
    for n, priority in enumerate((Priority.BACKGROUND, Priority.NORMAL, Priority.NORMAL,
                                  Priority.STRATEGIC, Priority.BACKGROUND)):
        library.publish(event(n, priority))
    assert drained(library, "slow") == ["ev-3", "ev-1", "ev-2"]
    library.publish(event(9))
    library.subscribe("other", ALL)
    with pytest.raises(QueueFull, match="2 subscriptions"):
        library.subscribe("third", ALL)
    clock.now += outbox.KEPT_SECONDS + 1
    library.subscribe("other", ALL)
    library.subscribe("third", ALL)
    assert not stored(library)
    with pytest.raises(NotInLibrary):
        library.next_event("slow")
