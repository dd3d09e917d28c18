"""`esper serve`: a library for workers and trainers in other processes and on other machines."""

from __future__ import annotations

import argparse
import logging
import signal

from esper.errors import ConfigError, EsperError
from esper.rpc.address import SOCKET, parse_address
from esper.slowtrack import stop_on

log = logging.getLogger("esper.serve")
SWEEP_SECONDS = 5.0


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: a network address without all that it needs.
        LibraryError: the folder or the address cannot be used.
    """
    from esper.oona.bus import Bus
    from esper.oona.capacity import CapacityWatch
    from esper.rpc.server import Network, Server
    from esper.urza.library import LocalLibrary

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    address = parse_address(options.listen or f"unix:{options.library}/{SOCKET}")
    given = (options.tls_cert, options.tls_key, options.tokens)
    network = Network(*given) if all(given) else None
    if network is None and any(given):
        raise ConfigError("--tls-cert, --tls-key and --tokens are given together or not at all")
    library = LocalLibrary(options.library)
    stop = stop_on(signal.SIGTERM, signal.SIGINT)
    bus = Bus()
    with (
        Server(library, address, network=network, bus=bus) as server,
        CapacityWatch(library.depths, bus.publish),
    ):
        print(f"serving {options.library} at {server.address}", flush=True)
        while not stop.wait(SWEEP_SECONDS):
            try:
                library.sweep()  # so that status and watchers see a lease end when it does
            except EsperError:
                log.warning("leases were not swept", exc_info=True)
    bus.close()
    library.close()
    print("stopped", flush=True)
    return 0
