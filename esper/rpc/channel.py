"""A client's channel: credentials, deadlines, and what may be sent again."""

from __future__ import annotations

import json
import ssl
import stat
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import MethodOptions

from esper.errors import ConfigError
from esper.leyline.proto.v1 import events_pb2, library_pb2
from esper.rpc.address import Access, Address

CALL_SECONDS = 10.0
TRANSFER_SECONDS = 600.0
STREAM_SECONDS = 3600.0  # of watching and subscribing, which begin again by themselves
CHUNK_BYTES = 1 << 20
LIST_SECONDS = 60.0
# Refused before they are parsed. A record may hold a report that came as a request, and more.
MAX_REQUEST_BYTES, MAX_ANSWER_BYTES = 4 << 20, 16 << 20
MAX_SECRET_BYTES = 1 << 20
MAX_TOKEN = 4096
_KEEPALIVE_MS = 30_000

_SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name]
    for file, name in ((library_pb2, "LibraryService"), (events_pb2, "EventService"))
)
_REPEATABLE = (MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT)


def retried() -> list[dict[str, str]]:
    """The methods that may be sent again: those that the `.proto` calls idempotent."""
    return [
        {"service": service.full_name, "method": method.name}
        for service in _SERVICES for method in service.methods
        if method.GetOptions().idempotency_level in _REPEATABLE
    ]


def _service_config() -> str:
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": retried(), "retryPolicy": policy}]})


OPTIONS: tuple[tuple[str, Any], ...] = (  # of both sides
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
)


def connect(address: Address, access: Access) -> grpc.Channel:
    """A channel; it connects when it is used, and again after the server was away.

    Raises:
        ConfigError: a file of `access` cannot be used, or does not go with the address.
    """
    options = [
        *OPTIONS,
        ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.service_config", _service_config()),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if address.socket is not None:
        if access != Access():
            raise ConfigError(f"{address} is a unix socket: tokens and TLS are for host:port only")
        return grpc.insecure_channel(address.target, options)
    if access.token_file is None:
        raise ConfigError(
            f"{address} is on a network, and a library there asks for a token; name the file that "
            "holds it (--token-file, token_file=)"
        )
    authorities = None
    if access.tls_ca is not None:
        authorities = read_secret(access.tls_ca, private=False)
        try:  # gRPC would only fail to connect
            ssl.create_default_context(cadata=authorities.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError) as e:
            raise ConfigError(f"{access.tls_ca} holds no certificates in PEM: {e}") from e
    token = read_secret(access.token_file, private=True).decode("ascii", "replace").strip()
    if not token.isascii() or not token.isprintable() or not 0 < len(token) <= MAX_TOKEN:
        raise ConfigError(f"{access.token_file} does not hold one token of printable ASCII")
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authorities), grpc.access_token_call_credentials(token)
    )
    return grpc.secure_channel(address.target, credentials, options)


def read_secret(path: Path, *, private: bool) -> bytes:
    """The content of a small file; a `private` one must be its owner's alone.

    Raises:
        ConfigError: it cannot be read, is too large, or others may read it.
    """
    try:
        with open(path, "rb") as file:
            if private and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                raise ConfigError(
                    f"{path} has mode {mode:03o}: others can read the secrets in it; chmod 600 it, "
                    "and replace them if somebody may have read them"
                )
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    if len(content) > MAX_SECRET_BYTES:
        raise ConfigError(f"{path} has over {MAX_SECRET_BYTES} bytes; is it the right file?")
    return content
