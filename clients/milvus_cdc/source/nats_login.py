"""How to connect to a NATS: a task's login and TLS as options of the client.

Laws: at most one way to log in; secrets and files are read each time a connection is made, so that
what was rotated counts from then on; nothing is sent on a connection that is not encrypted as it
should be.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import nkeys
from milvuscdc.v1 import secret_pb2, tls_pb2
from nats.aio.client import Client

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.secrets import SecretResolver, resolve
from milvus_cdc.source import NatsConfig

FIELD = "source.nats"
_JWT = re.compile(r"BEGIN NATS USER JWT-+\s+([\w=.-]+)\s")
_SEED = re.compile(r"BEGIN USER NKEY SEED-+\s+(\w+)\s")


@dataclass(frozen=True, slots=True)
class Login:
    """`options` of `Client.connect`; `field`: what to mend when the server refuses them."""

    options: dict[str, Any]
    field: str
    certificate: bool = False
    """It shows a certificate of its own."""


def login(config: NatsConfig, secrets: SecretResolver | None) -> Login:
    """Raises UserError, naming the field, for what does not go together or cannot be used."""
    _check(config)
    options, name = _credentials(config, secrets)
    certificate = False
    if config.tls is not None:
        options["tls"] = _context(config.tls)
        options["tls_handshake_first"] = config.tls_handshake_first
        if config.tls.server_name:
            options["tls_hostname"] = config.tls.server_name
        certificate = bool(config.tls.certificate_file)
    return Login(options, f"{FIELD}.{name}" if name else FIELD, certificate)


def _credentials(config: NatsConfig, secrets: SecretResolver | None) -> tuple[dict[str, Any], str]:
    """Options of the client, and the field they come from; empty when there is none."""
    if config.token is not None:
        return {"token": _secret(secrets, config.token, "token")}, "token"
    if config.password is not None:
        password = _secret(secrets, config.password, "password")
        return {"user": config.username, "password": password}, "password"
    if config.nkey_seed is not None:
        seed = _secret(secrets, config.nkey_seed, "nkey_seed")
        return {"nkeys_seed_str": _valid_seed(seed, "nkey_seed")}, "nkey_seed"
    if not config.credentials_file:
        return {}, ""
    # Read by ourselves: the client never ends on a file without the marks it looks for.
    field = f"{FIELD}.credentials_file"
    content = _allowed(secrets, field).file(config.credentials_file, field=field) + "\n"
    jwt, own_seed = _JWT.search(content), _SEED.search(content)
    if jwt is None or own_seed is None:
        raise UserError(
            "INVALID_FIELD",
            f"{field}: {config.credentials_file} is not a credentials file: it must hold a NATS "
            "user JWT and a user NKEY seed, as `nsc generate creds` writes them",
            field=field,
        )
    text = jwt.group(1).encode()
    seed = _valid_seed(own_seed.group(1), "credentials_file")
    return {"user_jwt_cb": lambda: text, "nkeys_seed_str": seed}, "credentials_file"


def _check(config: NatsConfig) -> None:
    if config.tls_handshake_first and config.tls is None:
        raise UserError(
            "INVALID_FIELD",
            f"{FIELD}.tls_handshake_first is of no use without {FIELD}.tls: set tls as well",
            field=f"{FIELD}.tls_handshake_first",
        )
    if "@" in urlsplit(config.url).netloc:
        raise UserError(
            "INVALID_FIELD",
            f"{FIELD}.url holds a login, which would be stored and shown: use username and "
            "password, token, nkey_seed or credentials_file",
            field=f"{FIELD}.url",
        )
    if bool(config.username) != (config.password is not None):
        missing = "password" if config.username else "username"
        raise UserError(
            "INVALID_FIELD",
            f"{FIELD}.{missing} is missing: username and password go together",
            field=f"{FIELD}.{missing}",
        )
    ways = {
        "token": config.token is not None,
        "username": bool(config.username),
        "credentials_file": bool(config.credentials_file),
        "nkey_seed": config.nkey_seed is not None,
    }
    first, *others = [name for name, there in ways.items() if there] or [""]
    if others:
        raise UserError(
            "INVALID_FIELD",
            f"{FIELD}.{others[0]} is a second way to log in beside {first}: take one of them away",
            field=f"{FIELD}.{others[0]}",
        )


def _allowed(secrets: SecretResolver | None, field: str) -> SecretResolver:
    if secrets is None:
        raise UserError(
            "SECRET_NOT_ALLOWED",
            f"{field} is a secret, and no SecretResolver says which ones may be used",
            field=field,
        )
    return secrets


def _secret(secrets: SecretResolver | None, secret: secret_pb2.Secret, name: str) -> str:
    field = f"{FIELD}.{name}"
    value = resolve(_allowed(secrets, field), secret, field)
    if value is None:
        raise UserError("INVALID_FIELD", f"{field} refers to nothing", field=field)
    return value


def _valid_seed(seed: str, name: str) -> str:
    field = f"{FIELD}.{name}"
    try:
        kind, _ = nkeys.decode_seed(seed.encode())
    except Exception:
        kind = None  # and no word about what was read
    if kind != nkeys.PREFIX_BYTE_USER:
        raise UserError(
            "INVALID_FIELD", f"{field} holds no seed of a user's NKey (`SU...`)", field=field
        )
    return seed


def _context(tls: tls_pb2.Tls) -> ssl.SSLContext:
    field = f"{FIELD}.tls"
    if bool(tls.certificate_file) != bool(tls.key_file):
        missing = "key_file" if tls.certificate_file else "certificate_file"
        raise UserError(
            "INVALID_FIELD",
            f"{field}.{missing} is missing: a client's certificate and its key go together",
            field=f"{field}.{missing}",
        )
    place = "ca_file"
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
        if tls.certificate_file:
            place = "certificate_file"
            # Without a password the library would ask for one at the terminal.
            context.load_cert_chain(tls.certificate_file, tls.key_file, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            "INVALID_FIELD",
            f"{field}.{place}{' or key_file' if place != 'ca_file' else ''} cannot be used at this "
            f"replicator: {reason}",
            field=f"{field}.{place}",
        ) from error
    return context


class SafeClient(Client):  # type: ignore[misc]
    """Goes on only where the connection will be as safe as it was told to be.

    nats-py encrypts where the server's first message, which is not encrypted, says so: without
    this, whoever can change that message would be sent the login in clear.
    """

    def __init__(self, *, certificate: bool) -> None:
        """`certificate`: the client has one of its own."""
        super().__init__()
        self._certificate = certificate
        self.greeted = False
        """The server's first words were read, and its offer of TLS looked at."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            self.greeted = True
            # After a handshake of its own the server says this inside of TLS, and a proxy's server
            # does not know of any.
            if "tls" in self.options and not self.options["tls_handshake_first"]:
                if not info.get("tls_required") and not info.get("tls_available"):
                    raise UserError(
                        "QUEUE_AUTHENTICATION_FAILED",
                        f"the NATS server offers no TLS: switch it on there, or take {FIELD}.tls "
                        "away",
                        field=f"{FIELD}.tls",
                    )
                # It would encrypt only where the server insists.
                info["tls_required"] = True
            if info.get("tls_verify") and not self._certificate:
                raise UserError(
                    "QUEUE_AUTHENTICATION_FAILED",
                    "the NATS server wants a certificate of its clients: set "
                    f"{FIELD}.tls.certificate_file and key_file",
                    field=f"{FIELD}.tls.certificate_file",
                )
        await super()._process_info(info, initial_connection)

    def why_lost(self) -> BaseException | None:
        """The refusal that ended the connection, where a write came before it was read."""
        reader = getattr(self._transport, "_io_reader", None)
        return None if reader is None else reader.exception()

    def check(self) -> None:
        """Raises BugError when the client came to be connected in a way that was not looked at."""
        if not self.greeted:
            raise BugError("QUEUE_PROTOCOL", "this nats-py does not ask before it encrypts")
