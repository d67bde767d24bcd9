"""Logins of a test broker of Pulsar: JWT tokens, TLS and client certificates.

`admin` may do everything; any other role what the tests grant it. A token is signed with a key
that only `token` knows, the broker its public half; a certificate's common name is its role.
"""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.servers.ports import free_port

_PROVIDERS = "org.apache.pulsar.broker.authentication"


class PulsarSecurity:
    """`service_url` and `admin_url` are those with TLS; `ca_file` is the authority to trust."""

    def __init__(self, folder: Path) -> None:
        self.ports = (free_port(), free_port())
        self.service_url = f"pulsar+ssl://127.0.0.1:{self.ports[0]}"
        self.admin_url = f"https://127.0.0.1:{self.ports[1]}"
        self._folder = folder / "tls"
        self.ca_file = self._folder / "ca.pem"
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def token(self, role: str, *, expires_unix_s: int | None = None) -> str:
        """A token the broker takes, until then if that is given."""
        claims: dict[str, object] = {"sub": role}
        if expires_unix_s is not None:
            claims["exp"] = expires_unix_s
        return jwt.encode(claims, self._key, algorithm="RS256")

    def certificate(self, role: str, *, authority: str = "ca") -> tuple[Path, Path]:
        """Certificate and key (PKCS 8) of a client; the broker knows no authority but `ca`."""
        certificate, key, request = (
            self._folder / f"{authority}-{role}{kind}" for kind in (".pem", "-key.pem", ".csr")
        )
        if not certificate.exists():
            self._authority(authority)
            names = self._folder / "names"
            names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
            ca, ca_key = self._folder / f"{authority}.pem", self._folder / f"{authority}-key.pem"
            _openssl(f"req -newkey rsa:2048 -nodes -keyout {key} -out {request} -subj /CN={role}")
            _openssl(
                f"x509 -req -in {request} -CA {ca} -CAkey {ca_key} -CAcreateserial "
                f"-out {certificate} -days 30 -extfile {names}"
            )
        return certificate, key

    def prepare(self) -> None:
        """Makes the authority and the broker's certificate."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.certificate("broker")

    def settings(self) -> dict[str, str]:
        """Of the broker."""
        certificate, key = self.certificate("broker")
        public = self._key.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
        return {
            "authenticationEnabled": "true",
            "authorizationEnabled": "true",
            "authenticationProviders": (
                f"{_PROVIDERS}.AuthenticationProviderToken,{_PROVIDERS}.AuthenticationProviderTls"
            ),
            "tokenPublicKey": f"data:;base64,{base64.b64encode(public).decode()}",
            # A token that has ended is asked for anew, and its connection ended, this soon.
            "authenticationRefreshCheckSeconds": "1",
            "superUserRoles": "admin",
            "brokerClientAuthenticationPlugin": (
                "org.apache.pulsar.client.impl.auth.AuthenticationToken"
            ),
            "brokerClientAuthenticationParameters": f"token:{self.token('admin')}",
            "brokerServicePortTls": str(self.ports[0]),
            "webServicePortTls": str(self.ports[1]),
            "tlsCertificateFilePath": str(certificate),
            "tlsKeyFilePath": str(key),
            "tlsTrustCertsFilePath": str(self.ca_file),
        }

    def _authority(self, name: str) -> None:
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        if not certificate.exists():
            _openssl(
                f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 30 "
                f"-subj /CN={name}-authority"
            )


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
