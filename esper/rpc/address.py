"""Where a library is: a folder, a unix socket, or a host and port. Importing this is cheap."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper.errors import ConfigError

if TYPE_CHECKING:
    from esper.leyline.library import KeptLibrary

SOCKET = "urza.sock"  # below a library's folder, where esper serve listens by default
_UNIX = "unix:"
MAX_SOCKET_PATH = 107  # bytes, without the zero; sockaddr_un of Linux
_HOST_PORT = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Address:
    """`socket` is the path of a unix socket, None where `target` is a host and a port."""

    target: str
    socket: Path | None = None

    def __str__(self) -> str:
        return self.target


@dataclass(frozen=True)
class Access:
    """What a client shows and checks on a network. `tls_ca` is a PEM file of the authorities
    that may vouch for the server; None takes those that gRPC brings."""

    token_file: Path | None = None
    tls_ca: Path | None = None


def is_address(where: str | Path) -> bool:
    """Whether `where` names a server. A `Path` is a folder, and so is all else."""
    return isinstance(where, str) and (
        where.startswith(_UNIX) or _HOST_PORT.fullmatch(where) is not None
    )


def parse_address(text: str) -> Address:
    """Read "unix:/path/to.sock" or "host:port".

    Raises:
        ConfigError: neither of them, or a socket's path that the system cannot hold.
    """
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX)).expanduser()
        if path in (Path(), Path("/")):
            raise ConfigError(f"{text!r} names no socket; expected unix:/path/to.sock")
        path = path.absolute()
        if len(bytes(path)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"the socket's path {path} has {len(bytes(path))} bytes, the system allows "
                f"{MAX_SOCKET_PATH}; choose a shorter one"
            )
        return Address(f"{_UNIX}{path}", path)
    found = _HOST_PORT.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ConfigError(
            f"{text!r} is not an address; expected unix:/path/to.sock or host:port"
        )
    return Address(text)


def open_library(
    where: str | Path,
    *,
    token_file: str | Path | None = None,
    tls_ca: str | Path | None = None,
) -> KeptLibrary:
    """The library in a folder, which becomes one where it is not; or behind an `esper serve`.

    Args:
        where: a folder, "unix:/path/to.sock" or "host:port".
        token_file: for host:port, the file that holds the bearer token.
        tls_ca: for host:port, a PEM file to check the server's certificate against; by
            default the authorities that gRPC brings.

    Raises:
        Unreachable: no server answers there.
        AccessDenied: it does, and refuses the token.
        LibraryError: the folder cannot be used.
        ConfigError: the address or a file cannot be used.
    """
    if not is_address(where):
        if token_file is not None or tls_ca is not None:
            raise ConfigError(f"{where} is a folder: tokens and TLS are for host:port only")
        from esper.urza.library import LocalLibrary

        return LocalLibrary(where)
    from esper.rpc.client import RemoteLibrary

    access = Access(
        Path(token_file) if token_file is not None else None,
        Path(tls_ca) if tls_ca is not None else None,
    )
    library = RemoteLibrary(str(where), access)
    library.check()
    return library
