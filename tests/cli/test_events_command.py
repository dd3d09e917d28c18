"""`esper events`: JSON for people, from where it was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esper.leyline.events import Event, Topic
from esper.rpc.address import parse_address
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.cli.test_commands import _environment, esper_command
from tests.rpc.support import wait_until
from tests.urza.support import SIG, blueprint


@contextmanager
def events(address: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, "-m", "esper.cli.main", "events", "--urza", address, *arguments],
        stdout=subprocess.PIPE, text=True, env=_environment())
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def said(running: subprocess.Popen[str]) -> dict[str, object]:
    assert running.stdout is not None
    told: dict[str, object] = json.loads(running.stdout.readline())
    return told


def test_events_are_printed_and_kept_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = LocalLibrary(tmp_path / "library")
    address = parse_address(f"unix:{tmp_path}/s")

    def listening() -> bool:
        library.submit(blueprint(1), SIG, author="karn")
        with library._store.read() as con:
            return bool(con.execute("SELECT 1 FROM subscriptions").fetchone())

    topic = ("--topic", Topic.BLUEPRINT_SUBMITTED, "--name", "me")
    with Server(library, address):
        with events(str(address), *topic) as running:
            assert wait_until(listening, 60)
            library.publish(Event(topic=Topic.EPOCH, sender="test"))
            library.submit(blueprint(2), SIG, author="karn")
            first = said(running)
            assert first["topic"] == Topic.BLUEPRINT_SUBMITTED
            body = first["body"]
            assert isinstance(body, dict) and body["blueprint_id"] == blueprint(2).id
            assert wait_until(lambda: library.next_event("me") is None)
        library.submit(blueprint(3), SIG, author="karn")
        with events(str(address), *topic) as running:
            body = said(running)["body"]
            assert isinstance(body, dict) and body["blueprint_id"] == blueprint(3).id
    refused = esper_command("events", "--urza", "here", "--name", "me")
    assert refused.returncode == 2 and "not an address" in refused.stderr
