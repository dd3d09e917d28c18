"""Where a command finds the library, and how it is told to stop."""

from __future__ import annotations

import os
import signal
import threading
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


def stop_on_signals() -> threading.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process as it always does.

    A thread sets it, not the handler: that runs in the main thread, perhaps in the middle of a
    wait for this event, and would then wait for a lock that it holds itself.
    """
    stop = threading.Event()
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def first(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    def watch() -> None:
        while os.read(told, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass  # of another handler's signal
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, first)
    signal.set_wakeup_fd(tell)
    threading.Thread(target=watch, name="esper-signals", daemon=True).start()
    return stop
