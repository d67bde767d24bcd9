"""Listeners of a test broker where one has to log in, and its rights.

Users `alice` (may do what the tests grant her) and `bob` (may do nothing), both with the password
`PASSWORD`, by PLAIN and SCRAM; OAUTHBEARER takes any unsigned token and its `sub` as the user;
the TLS listeners have a certificate of an authority of its own, for 127.0.0.1; one of them lets in
whoever shows a certificate of that authority, one whoever logs in.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers.ports import free_port

USERS = ("alice", "bob")
PASSWORD = "correct horse"

_LOGIN = "org.apache.kafka.common.security"


class KafkaSecurity:
    """`sasl`, `tls`, `mutual_tls` and `sasl_tls` are `host:port`; `ca_file` is the authority to
    trust, `certificate_file` and `key_file` belong to a client that it vouches for.
    """

    def __init__(self, folder: Path) -> None:
        self.ports = tuple(free_port() for _ in range(4))
        self.sasl, self.tls, self.mutual_tls, self.sasl_tls = (
            f"127.0.0.1:{port}" for port in self.ports
        )
        self._folder = folder
        self.ca_file = folder / "ca.pem"
        self.certificate_file, self.key_file = folder / "client.pem", folder / "client-key.pem"

    def settings(self) -> dict[str, str]:
        """Of the broker; those of a list are to be added to what is there."""
        users = " ".join(f'user_{user}="{PASSWORD}"' for user in USERS)
        listener = "listener.name.sasl"
        listeners = (
            f"SASL://{self.sasl},TLS://{self.tls},MTLS://{self.mutual_tls},"
            f"SASLTLS://{self.sasl_tls}"
        )
        return {
            "listeners": listeners,
            "advertised.listeners": listeners,
            "listener.security.protocol.map": (
                "SASL:SASL_PLAINTEXT,TLS:SSL,MTLS:SSL,SASLTLS:SASL_SSL"
            ),
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.mtls.ssl.truststore.type": "PEM",
            "listener.name.mtls.ssl.truststore.location": str(self.ca_file),
            "listener.name.sasltls.plain.sasl.jaas.config": (
                f"{_LOGIN}.plain.PlainLoginModule required {users};"
            ),
            "listener.name.sasltls.sasl.enabled.mechanisms": "PLAIN",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            f"{listener}.plain.sasl.jaas.config": (
                f"{_LOGIN}.plain.PlainLoginModule required {users};"
            ),
            f"{listener}.scram-sha-256.sasl.jaas.config": (
                f"{_LOGIN}.scram.ScramLoginModule required;"
            ),
            f"{listener}.scram-sha-512.sasl.jaas.config": (
                f"{_LOGIN}.scram.ScramLoginModule required;"
            ),
            f"{listener}.oauthbearer.sasl.jaas.config": (
                f"{_LOGIN}.oauthbearer.OAuthBearerLoginModule required "
                'unsecuredLoginStringClaim_sub="broker";'
            ),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._folder / "server.pem"),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }

    def storage_arguments(self) -> list[str]:
        """Of the tool that formats the data folder: SCRAM logins live there."""
        return [
            f"--add-scram={mechanism}=[name={user},password={PASSWORD}]"
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for user in USERS
        ]

    def prepare(self) -> None:
        """Makes the authority, the broker's certificate and a client's."""
        names = self._folder / "names"
        names.write_text("subjectAltName=IP:127.0.0.1\n")
        ca_key = self._folder / "ca-key.pem"
        _openssl(
            f"req -x509 -newkey rsa:2048 -nodes -keyout {ca_key} -out {self.ca_file} -days 30 "
            "-subj /CN=test-authority"
        )
        for name, key, certificate in (
            ("broker", self._folder / "k.pem", self._folder / "c.pem"),
            ("client", self.key_file, self.certificate_file),
        ):
            request = self._folder / "r.pem"
            _openssl(f"req -newkey rsa:2048 -nodes -keyout {key} -out {request} -subj /CN={name}")
            _openssl(
                f"x509 -req -in {request} -CA {self.ca_file} -CAkey {ca_key} -CAcreateserial "
                f"-out {certificate} -days 30 -extfile {names}"
            )
        (self._folder / "server.pem").write_text(
            (self._folder / "k.pem").read_text() + (self._folder / "c.pem").read_text()
        )


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
