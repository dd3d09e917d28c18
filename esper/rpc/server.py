"""A server: a library and its events behind one address, closed to all who are not meant."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from esper.errors import ConfigError, LibraryError
from esper.leyline.library import ServedLibrary
from esper.leyline.proto.v1 import events_pb2_grpc, library_pb2_grpc
from esper.oona.bus import Bus
from esper.rpc.address import Address
from esper.rpc.answering import MAX_STREAMS, Streams
from esper.rpc.channel import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, OPTIONS, read_secret
from esper.rpc.event_service import EventServicer
from esper.rpc.library_service import LibraryServicer
from esper.rpc.roles import Guard, Tokens

log = logging.getLogger(__name__)
SERVICES = ("esper.v1.LibraryService", "esper.v1.EventService")
_CALLS = 32  # at work at a time, besides the streams that stay open
_QUEUED = 256  # and so many waiting; more are refused at once


@dataclass(frozen=True)
class Network:
    """What a server needs to listen on a network: PEM files, and the file of the tokens."""

    tls_cert: Path
    tls_key: Path
    tokens: Path


class Server:
    """Serves from `start` until `stop`; a context manager.

    On a unix socket everybody who may open it may do everything, and that is its owner only.
    On a network every call needs TLS and a token with a role for its method.

    Args:
        bus: what is published there is kept for subscribers like all else; the caller's own.
        address: port 0 takes a free one; `address` says which, after `start`.

    Raises:
        ConfigError: a network address without `network`, or files that cannot be used.
    """

    def __init__(
        self,
        library: ServedLibrary,
        address: Address,
        *,
        network: Network | None = None,
        bus: Bus | None = None,
    ) -> None:
        if address.socket is None and network is None:
            raise ConfigError(
                f"{address} is on a network, where nobody is served without TLS and tokens: give a "
                "certificate, its key and a file of tokens, or listen on unix:/path/to.sock"
            )
        if address.socket is not None and network is not None:
            raise ConfigError(f"{address} is a unix socket: TLS and tokens are for host:port only")
        self.address = address
        self._streams = Streams()
        self._leave_bus = bus.subscribe(None, library.publish) if bus is not None else None
        guard: list[grpc.ServerInterceptor] = []
        if network is not None:
            guard.append(Guard(Tokens.load(network.tokens)))
        self._server = grpc.server(
            ThreadPoolExecutor(_CALLS + MAX_STREAMS, thread_name_prefix="esper-rpc"),
            interceptors=guard,
            maximum_concurrent_rpcs=_CALLS + MAX_STREAMS + _QUEUED,
            options=[
                *OPTIONS,
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a share
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._credentials = None if network is None else _credentials(network)
        library_pb2_grpc.add_LibraryServiceServicer_to_server(
            LibraryServicer(library, self._streams), self._server)
        events_pb2_grpc.add_EventServiceServicer_to_server(
            EventServicer(library, self._streams), self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def start(self) -> Server:
        """Listen.

        Raises:
            LibraryError: the address is taken, or cannot be listened at.
        """
        try:
            self._bind()
        except (RuntimeError, OSError) as e:
            raise LibraryError(f"cannot listen at {self.address}: {e}") from e
        self._server.start()
        for service in ("", *SERVICES):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving at %s", self.address)
        return self

    def _bind(self) -> None:
        if self.address.socket is None:
            assert self._credentials is not None
            port = self._server.add_secure_port(self.address.target, self._credentials)
            host = self.address.target.rpartition(":")[0]
            self.address = Address(f"{host}:{port}")
            return
        path = self.address.socket
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _answers(path):  # gRPC would take the path away from under its owner
            raise OSError(f"another server listens on {path}")
        # The socket must not be open to others even between being made and being changed.
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(self.address.target)
        finally:
            os.umask(before)
        path.chmod(0o600)

    def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, let running ones end for `grace` seconds, then end them."""
        self._health.enter_graceful_shutdown()
        self._streams.stopping.set()
        if self.address.socket is not None:  # not later, when it may be the next server's
            self.address.socket.unlink(missing_ok=True)
        self._server.stop(grace).wait()
        if self._leave_bus is not None:
            self._leave_bus()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _credentials(network: Network) -> grpc.ServerCredentials:
    key = read_secret(network.tls_key, private=True)
    certificate = read_secret(network.tls_cert, private=False)
    try:  # gRPC would say no more than that it could not listen
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            network.tls_cert, network.tls_key, password=lambda: b""
        )
    except (ssl.SSLError, ValueError) as e:
        raise ConfigError(
            f"{network.tls_cert} and {network.tls_key} are not a certificate in PEM and its "
            f"unencrypted key: {e}"
        ) from e
    return grpc.ssl_server_credentials([(key, certificate)])


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
