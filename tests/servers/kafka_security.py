"""Listeners of a test broker where one has to log in, and its rights.

Users `alice` (may do what the tests grant her) and `bob` (may do nothing), both with the password
`PASSWORD`, by PLAIN and SCRAM; OAUTHBEARER takes any unsigned token and its `sub` as the user;
the TLS listener has a certificate of an authority of its own, for 127.0.0.1.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers.ports import free_port

USERS = ("alice", "bob")
PASSWORD = "correct horse"

_LOGIN = "org.apache.kafka.common.security"


class KafkaSecurity:
    """`sasl` and `tls` are `host:port`; `ca_file` is the authority to trust."""

    def __init__(self, folder: Path) -> None:
        self.ports = (free_port(), free_port())
        self.sasl, self.tls = (f"127.0.0.1:{port}" for port in self.ports)
        self._folder = folder
        self.ca_file = folder / "ca.pem"

    def settings(self) -> dict[str, str]:
        """Of the broker; those of a list are to be added to what is there."""
        users = " ".join(f'user_{user}="{PASSWORD}"' for user in USERS)
        listener = "listener.name.sasl"
        return {
            "listeners": f"SASL://{self.sasl},TLS://{self.tls}",
            "advertised.listeners": f"SASL://{self.sasl},TLS://{self.tls}",
            "listener.security.protocol.map": "SASL:SASL_PLAINTEXT,TLS:SSL",
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
        """Makes the authority and the broker's certificate."""
        key, request, certificate = (self._folder / n for n in ("k.pem", "r.pem", "c.pem"))
        names = self._folder / "names"
        names.write_text("subjectAltName=IP:127.0.0.1\n")
        ca_key = self._folder / "ca-key.pem"
        for arguments in (
            f"req -x509 -newkey rsa:2048 -nodes -keyout {ca_key} -out {self.ca_file} -days 30 "
            "-subj /CN=test-authority",
            f"req -newkey rsa:2048 -nodes -keyout {key} -out {request} -subj /CN=broker",
            f"x509 -req -in {request} -CA {self.ca_file} -CAkey {ca_key} -CAcreateserial "
            f"-out {certificate} -days 30 -extfile {names}",
        ):
            subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
        (self._folder / "server.pem").write_text(key.read_text() + certificate.read_text())
