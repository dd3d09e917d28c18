"""The libraries that the suite of this folder runs over.

A backend joins by adding a factory to `BACKENDS`: it makes a library in a folder, on a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from esper.leyline.library import Library
from esper.rpc.address import parse_address
from esper.rpc.client import RemoteLibrary
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary
from tests.urza.support import Clock


@contextmanager
def local(root: Path, clock: Clock) -> Iterator[Library]:
    yield LocalLibrary(root, clock)


@contextmanager
def over_grpc(root: Path, clock: Clock) -> Iterator[Library]:
    """The client of a real server on a unix socket, with a cache that begins empty."""
    address = parse_address(f"unix:{root}/urza.sock")
    with Server(LocalLibrary(root / "library", clock), address):
        client = RemoteLibrary(str(address), cache=root / "cache")
        yield client
        client.close()


BACKENDS: dict[str, Callable[[Path, Clock], AbstractContextManager[Library]]] = {
    "local": local,
    "grpc": over_grpc,
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=BACKENDS)
def library(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> Iterator[Library]:
    with BACKENDS[request.param](tmp_path, clock) as opened:
        yield opened
