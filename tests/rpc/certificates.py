"""A certificate for localhost that vouches for itself, and a file of tokens."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from esper.rpc.server import Network

TOKENS = {role: f"{role}-" + role[0] * 40 for role in ("reader", "trainer", "worker", "admin")}


def write_network(folder: Path) -> Network:
    """cert.pem, key.pem and tokens.yaml in `folder`, and one file per token for clients."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([
            x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_private(folder / "key.pem", key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()).decode())
    for role, token in TOKENS.items():
        write_private(folder / f"{role}.token", token + "\n")
    write_private(folder / "tokens.yaml", yaml.safe_dump([
        {"name": f"a {role}", "token": token, "roles": [role]} for role, token in TOKENS.items()
    ]))
    return Network(folder / "cert.pem", folder / "key.pem", folder / "tokens.yaml")


def write_private(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
