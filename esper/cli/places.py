"""Where a command finds the library."""

from __future__ import annotations

from pathlib import Path

from esper.errors import ConfigError, NotInLibrary
from esper.leyline.library import KeptLibrary
from esper.rpc.address import is_address, open_library
from esper.urza.library import LocalLibrary


def existing_folder(where: str) -> LocalLibrary:
    """The library in a folder that has one already: looking must not make one.

    Raises:
        NotInLibrary: the folder holds no library.
        ConfigError: it is an address.
    """
    if is_address(where):
        raise ConfigError(f"{where} is an address; run this where the library's folder is")
    if not (Path(where) / "library.db").is_file():
        raise NotInLibrary(
            f"there is no library in {where} (no library.db); name its folder or the address of "
            "an esper serve, or make one by training: esper train examples/digits.yaml"
        )
    return LocalLibrary(where)


def existing_library(
    where: str, token_file: Path | None = None, tls_ca: Path | None = None
) -> KeptLibrary:
    """The same, or the library behind an address.

    Raises:
        NotInLibrary: the folder holds no library.
        Unreachable, AccessDenied: see `esper.open_library`.
    """
    if is_address(where):
        return open_library(where, token_file=token_file, tls_ca=tls_ca)
    return existing_folder(where)
