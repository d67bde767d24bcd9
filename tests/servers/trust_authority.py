"""A certificate authority of a test's own, tokens and their keys."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ISSUER, AUDIENCE = "https://issuer.test", "milvus-cdc"


@dataclass(frozen=True)
class Issued:
    """A certificate and its key as files."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def server(self) -> dict[str, str]:
        """The block `tls` of both services, with mutual TLS."""
        return {
            "certificateFile": str(self.certificate),
            "keyFile": str(self.key),
            "clientCaFile": str(self.ca),
        }

    @property
    def client(self) -> dict[str, str]:
        """The block `controllerTls`."""
        return {
            "caFile": str(self.ca),
            "certificateFile": str(self.certificate),
            "keyFile": str(self.key),
        }

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes()
        )


class Authority:
    """Issues certificates for this machine's loopback, below a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def trusted(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.file.read_bytes())

    def issue(
        self, name: str, *, uris: Sequence[str] = (), days: float = 30, file: str = ""
    ) -> Issued:
        """For server and client; `days` below 0: it is over."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.IPAddress(ip_address("127.0.0.1"))]
        names += [x509.UniformResourceIdentifier(uri) for uri in uris]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(
            self.file,
            self.folder / f"{file or name}.crt",
            self.folder / f"{file or name}.key",
        )
        issued.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        issued.key.write_bytes(private_pem(key))
        return issued


def private_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Issuer:
    """Signs web tokens; `keys` are shown as a JWKS."""

    def __init__(self, kid: str = "first") -> None:
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.rotate(kid)

    def rotate(self, kid: str) -> None:
        """Another key, and only that."""
        self.kid = kid
        self.keys = {kid: ec.generate_private_key(ec.SECP256R1())}

    def public_pem(self) -> bytes:
        pem: bytes = (
            self.keys[self.kid]
            .public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        return pem

    def jwks(self) -> bytes:
        shown = []
        for kid, key in self.keys.items():
            entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
            shown.append({**entry, "kid": kid, "use": "sig", "alg": "ES256"})
        return json.dumps({"keys": shown}).encode()

    def token(self, *, seconds: float = 600, **claims: Any) -> str:
        """`None` as a claim leaves it out."""
        body = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "somebody",
            "exp": int(time.time() + seconds),
            **claims,
        }
        said = {key: value for key, value in body.items() if value is not None}
        return jwt.encode(said, self.keys[self.kid], algorithm="ES256", headers={"kid": self.kid})
