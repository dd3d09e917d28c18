"""A server on a unix socket, its library and a client; nothing lands in the user's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.rpc.address import Address, parse_address
from esper.rpc.client import RemoteLibrary
from esper.rpc.server import Server
from esper.urza.library import LocalLibrary


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture
def address(tmp_path: Path) -> Address:
    return parse_address(f"unix:{tmp_path}/urza.sock")


@pytest.fixture
def local(tmp_path: Path) -> LocalLibrary:
    return LocalLibrary(tmp_path / "library")


@pytest.fixture
def server(local: LocalLibrary, address: Address) -> Iterator[Server]:
    with Server(local, address) as started:
        yield started


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Iterator[RemoteLibrary]:
    library = RemoteLibrary(str(server.address), cache=tmp_path / "cache")
    yield library
    library.close()
