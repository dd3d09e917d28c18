"""`esper worker`: Karn, Tezzeret or Urabrask, at work for a library anywhere."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import threading

from esper.errors import Unreachable
from esper.slowtrack import run_service, stop_on
from esper.tezzeret.workshop import CUDA_ARCH

log = logging.getLogger("esper.worker")


def run(options: argparse.Namespace) -> int:
    """Work until SIGTERM or SIGINT, then give back what is not done.

    Raises:
        AccessDenied: the token is not good for this work.
        EsperError: this machine cannot do it; no C++ compiler, for one.
    """
    from esper.rpc.address import Access
    from esper.rpc.client import RemoteLibrary

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # several items at a time, not several threads each
    if options.cuda_arch:
        os.environ[CUDA_ARCH] = options.cuda_arch
    stop = stop_on(signal.SIGTERM, signal.SIGINT)
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop.set()

    # A service tries again after every error; a token will not get better by that.
    library = RemoteLibrary(
        options.urza, Access(options.token_file, options.tls_ca), on_denied=fail
    )
    try:
        library.check()
    except Unreachable as e:
        log.warning("starting all the same: %s", e)  # a farm comes up in no order

    def serve(number: int) -> None:
        name = f"{options.role}@{socket.gethostname()}-{os.getpid()}-{number}"
        try:
            run_service(options.role, library, stop, name=name, seed=number,
                        pipeline=options.pipeline)
        except BaseException as e:
            fail(e)

    threads = [threading.Thread(target=serve, args=(n,), name=f"{options.role}-{n}")
               for n in range(options.concurrency)]
    for thread in threads:
        thread.start()
    print(f"{options.role} at work for {library.address}, {options.concurrency} at a time",
          flush=True)
    stop.wait()
    for thread in threads:
        thread.join()
    library.close()
    if failures:
        raise failures[0]
    print("stopped; what was not done is given back, or its lease ends by itself", flush=True)
    return 0
