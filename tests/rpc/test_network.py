"""On a network nobody is served without TLS and a token, and a token opens its role only."""

from __future__ import annotations

import logging
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from esper.errors import AccessDenied, ConfigError, LibraryError, Unreachable
from esper.leyline.lifecycle import BlueprintStatus
from esper.leyline.proto.v1 import events_pb2, library_pb2
from esper.rpc.address import Access, Address, is_address, open_library, parse_address
from esper.rpc.client import RemoteLibrary
from esper.rpc.roles import ALLOWED, OPEN, Tokens
from esper.rpc.server import Network, Server
from esper.urza.library import LocalLibrary
from tests.rpc.certificates import TOKENS, write_network, write_private
from tests.urza.support import SIG, artifact, blueprint, report

Served = tuple[Path, str]  # folder of the secrets, address


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("network")
    network = write_network(folder)
    with Server(LocalLibrary(folder / "library"), Address("127.0.0.1:0"), network=network) as s:
        yield folder, str(s.address)


def client(served: Served, role: str) -> RemoteLibrary:
    folder, address = served
    access = Access(folder / f"{role}.token", folder / "cert.pem")
    return RemoteLibrary(address, access, cache=folder / "cache")


def test_one_kernel_by_three_roles_over_tls(served: Served) -> None:
    trainer, worker, reader = (client(served, r) for r in ("trainer", "worker", "reader"))
    trainer.register_signature(SIG)
    worker.submit(blueprint(), SIG, author="karn")
    claim = worker.claim_blueprint("forge", 60)
    assert claim is not None
    kernel = worker.complete_blueprint(claim, artifact(claim.record.ir))
    work = worker.claim_kernel("bench", 60)
    assert work is not None
    worker.complete_kernel(work, report(kernel.kernel_id))
    assert reader.fetch(kernel.digest).read_bytes() == artifact(claim.record.ir)
    trainer.quarantine(kernel.kernel_id, "NaN")
    with pytest.raises(AccessDenied, match=r"Retire is for admin; this token is of worker"):
        worker.retire(kernel.kernel_id, "enough")
    admin = client(served, "admin")
    admin.retire(kernel.kernel_id, "enough")
    admin.archive(blueprint().id, SIG, "not wanted")
    assert [b.status for b in reader.blueprints()] == [BlueprintStatus.ARCHIVED]


def test_every_method_is_refused_to_every_other_role(served: Served) -> None:
    """The table is tried out as a whole: what it does not allow is refused on the wire, before
    anything of the request is looked at."""
    folder, address = served
    secure = grpc.ssl_channel_credentials((folder / "cert.pem").read_bytes())
    services = [*library_pb2.DESCRIPTOR.services_by_name.values(),
                *events_pb2.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{s.full_name}/{m.name}" for s in services for m in s.methods}
    assert methods <= set(ALLOWED), "a method without an entry is nobody's"
    with grpc.secure_channel(address, secure) as channel:
        for method in methods:
            call = channel.stream_stream(method)
            for role, token in [*TOKENS.items(), ("nobody", "x" * 40), ("none", "")]:
                if role in ALLOWED[method]:
                    continue
                headers = [("authorization", f"Bearer {token}")] if token else []
                with pytest.raises(grpc.RpcError) as refused:
                    next(call(iter([b""]), metadata=headers, timeout=60))
                expected = (grpc.StatusCode.PERMISSION_DENIED if role in TOKENS
                            else grpc.StatusCode.UNAUTHENTICATED)
                assert refused.value.code() is expected, (method, role)  # type: ignore[attr-defined]


def test_health_needs_no_token_and_reflection_does(served: Served) -> None:
    folder, address = served
    secure = grpc.ssl_channel_credentials((folder / "cert.pem").read_bytes())
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.secure_channel(address, secure) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="esper.v1.LibraryService"), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            next(reflect(iter([asked]), timeout=60))
        found = next(reflect(iter([asked]), timeout=60,
                             metadata=[("authorization", f"Bearer {TOKENS['reader']}")]))
        names = {s.name for s in found.list_services_response.service}
        assert {"esper.v1.LibraryService", "esper.v1.EventService"} <= names
    assert list(OPEN) == ["/grpc.health.v1.Health/Check"]


def test_a_client_refuses_a_server_that_nobody_vouches_for(served: Served, tmp_path: Path) -> None:
    folder, address = served
    write_network(tmp_path)  # another certificate for the same name
    with pytest.raises(Unreachable):
        open_library(address, token_file=folder / "reader.token", tls_ca=tmp_path / "cert.pem")
    write_private(tmp_path / "false.token", "n" * 43)
    with pytest.raises(AccessDenied, match="known bearer token"):
        open_library(address, token_file=tmp_path / "false.token", tls_ca=folder / "cert.pem")
    with pytest.raises(ConfigError, match="no certificates in PEM"):
        open_library(address, token_file=folder / "reader.token", tls_ca=folder / "reader.token")
    with pytest.raises(ConfigError, match="asks for a token"):
        open_library(address)


def test_a_network_is_not_listened_on_without_tls_and_tokens(tmp_path: Path) -> None:
    library = LocalLibrary(tmp_path / "library")
    for host in ("0.0.0.0:0", "localhost:0", "[::1]:0"):
        with pytest.raises(ConfigError, match="without TLS and tokens"):
            Server(library, Address(host))
    network = write_network(tmp_path)
    network.tokens.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        Server(library, Address("127.0.0.1:0"), network=network)
    with pytest.raises(ConfigError, match="unix socket"):
        Server(library, parse_address(f"unix:{tmp_path}/s"), network=network)
    network.tokens.chmod(0o600)
    network.tls_key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"key\.pem has mode 644"):
        Server(library, Address("127.0.0.1:0"), network=network)
    network.tls_key.chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be read"):
        Server(library, Address("127.0.0.1:0"),
               network=Network(tmp_path / "gone", network.tls_key, network.tokens))
    with pytest.raises(ConfigError, match="not a certificate in PEM and its unencrypted key"):
        Server(library, Address("127.0.0.1:0"),
               network=Network(network.tls_key, network.tls_key, network.tokens))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{name: a, token: short-secret, roles: [worker]}]", "at least 32"),
        (f"[{{name: a, token: {'s' * 40}, roles: [king]}}]", "reader, trainer, worker, admin"),
        (f"[{{name: a, token: {'s' * 40}, roles: []}}]", "roles"),
        (f"[{{name: a, token: {'s' * 40}, roles: [worker]}}, "
         f"{{name: b, token: {'s' * 40}, roles: [reader]}}]", "twice"),
        ("[]", "at least one"),
        ("token: [secret", "not YAML"),
        ("secret", "list"),
    ],
)
def test_a_file_of_tokens_is_refused_and_not_quoted(
    tmp_path: Path, text: str, expected: str
) -> None:
    write_private(tmp_path / "tokens", text)
    with pytest.raises(ConfigError, match=expected) as caught:
        Tokens.load(tmp_path / "tokens")
    assert "secret" not in str(caught.value) and "ssss" not in str(caught.value)
    assert caught.value.__cause__ is None, "a traceback would quote the file"


def test_no_token_is_ever_logged(
    served: Served, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(AccessDenied) as caught:
        client(served, "reader").claim_blueprint("w", 60)
    said = caplog.text + "".join(capfd.readouterr()) + str(caught.value)
    assert "a reader was refused" in said
    assert not any(token in said for token in TOKENS.values())


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/deep/urza.sock")
    assert address.socket is not None
    library = LocalLibrary(tmp_path / "library")
    with Server(library, address):
        assert stat.S_IMODE(address.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(address.socket.parent.stat().st_mode) == 0o700
        with pytest.raises(LibraryError, match="another server listens"):
            Server(library, address).start()
        assert open_library(str(address)).capacity() == 1.0, "it serves on"
    assert not address.socket.exists()
    # What a killed server leaves behind is no obstacle.
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(address.socket))
    left.close()
    with Server(library, address):
        assert open_library(str(address)).capacity() == 1.0


def test_addresses() -> None:
    assert is_address("unix:x.sock") and is_address("host-1.lan:50051") and is_address("[::1]:80")
    for folder in ("library", "./host:80", "/a:80", Path("host:80"), "host:port", ":80"):
        assert not is_address(folder)
    assert parse_address("unix:x.sock").socket == Path("x.sock").absolute()
    for text, expected in (("unix:", "names no socket"), ("unix:/" + "x" * 200, "107"),
                           ("host:99999", "host:port"), ("library", "host:port")):
        with pytest.raises(ConfigError, match=expected):
            parse_address(text)
