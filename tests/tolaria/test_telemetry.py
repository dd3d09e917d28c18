"""What a session tells: the health of its seeds, each consideration once, and where it goes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from esper.leyline.command import Action, Command, SeedHealth
from esper.leyline.events import Event, Topic
from esper.leyline.lifecycle import SeedState
from esper.leyline.payloads import payload_of
from esper.tamiyo.state import Considered, Decision
from esper.tolaria.telemetry import QUEUED, Considerations, Outgoing
from esper.tolaria.trainer import Trainer
from esper.urza.library import LocalLibrary
from tests.tolaria.test_session import Scripted, loss_fn, make_session


def test_a_consideration_is_said_when_it_changes() -> None:
    said = Considerations()
    no, later = Considered("k1", "a", False, "too large"), Considered("k2", "a", False, "untried")
    first = said.news(Decision((), (no, later)))
    assert [c["kernel_id"] for c in first["considered"]] == ["k1", "k2"]
    assert said.news(Decision((), (no, later))) == {}
    assert said.news(Decision((), ())) == {} == said.news(Decision((), (no,)))
    taken = Considered("k2", "a", True, "untried")
    chosen = said.news(Decision((), (no, taken)))
    assert chosen == {"considered": [vars(taken)], "unchanged": 1, "put_off": ""}
    assert said.news(Decision((), (later,)))["considered"] == [vars(later)]
    elsewhere = Considered("k1", "b", False, "too large")
    assert said.news(Decision((), (elsewhere, no)))["considered"] == [vars(elsewhere)]
    assert said.news(Decision((), (), "slowed"))["put_off"] == "slowed"
    assert said.news(Decision((), (), "slowed")) == {} == said.news(Decision((), ()))
    assert said.news(Decision((), (), "slowed"))["put_off"] == "slowed"


def test_health_and_commands_of_a_run_reach_the_librarys_subscribers(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path)
    library.subscribe("watcher", frozenset({Topic.SEED_HEALTH, Topic.COMMANDS, Topic.EPOCH}))
    script = {1: [(Action.GERMINATE, "1")], 3: [(Action.ADVANCE, "1")]}
    session, data = make_session(policy=Scripted(script), library=library)
    threads = set()
    session.observers.append(lambda record: threads.add(threading.get_ident()))
    Trainer(session.model, session.optimizer, loss_fn, data, session).fit(5)
    session.close()
    assert threads == {threading.get_ident()}
    events: list[Event] = []
    while (found := library.next_event("watcher")) is not None:
        events.append(found)
        library.acknowledge("watcher", found.event_id)
    epochs = [e.body["epoch"] for e in events if e.topic is Topic.EPOCH]
    assert epochs == [1, 2, 3, 4, 5]
    commands = [Command.model_validate(e.body["command"]) for e in events
                if e.topic is Topic.COMMANDS]
    assert [c.action for c in commands] == [Action.GERMINATE, Action.ADVANCE]
    health = [payload_of(e) for e in events if e.topic is Topic.SEED_HEALTH]
    seen = [(h.epoch, h.state) for h in health if isinstance(h, SeedHealth)]
    assert seen[:2] == [(2, SeedState.TRAINING), (3, SeedState.TRAINING)]
    assert [e for e, _ in seen] == [2, 3, 4, 5]
    for h in health:
        assert isinstance(h, SeedHealth) and h.run_id == session.run_id
        assert h.trace_id == commands[0].trace_id, "one trace from the command on"
        assert h.grad_norm is not None and h.grad_norm > 0
    assert isinstance(health[0], SeedHealth) and health[0].gain is not None
    assert health[0].drift is None, "in TRAINING it was not measured"


class Unreachable:
    """A library that answers when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.taken = 0

    def publish(self, event: Event) -> None:
        self.go.wait(60)
        self.taken += 1


def test_a_library_that_does_not_answer_holds_up_nothing() -> None:
    library = Unreachable()
    outgoing = Outgoing(library)
    event = Event(topic=Topic.EPOCH, sender="test")
    started = time.monotonic()
    for _ in range(QUEUED + 100):
        outgoing(event)
    assert time.monotonic() - started < 10, "it would wait for a minute"
    outgoing.close(timeout=0.1)
    library.go.set()
    assert library.taken <= 1
