"""`esper events`: what happens in a library and in the runs that use it, a line of JSON each."""

from __future__ import annotations

import argparse

from esper.leyline.events import Topic
from esper.rpc.address import Access, open_library
from esper.rpc.remote_bus import RemoteBus


def run(options: argparse.Namespace) -> int:
    """Print events until interrupted; each is acknowledged once it is printed.

    Raises:
        Unreachable, AccessDenied: see `esper.open_library`.
    """
    topic = None if options.topic is None else Topic(options.topic)
    bus = RemoteBus(options.urza, Access(options.token_file, options.tls_ca))
    open_library(options.urza, token_file=options.token_file, tls_ca=options.tls_ca).close()
    for event in bus.events(topic, name=options.name):
        print(event.model_dump_json(), flush=True)
    return 0
