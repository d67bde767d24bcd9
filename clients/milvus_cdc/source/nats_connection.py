"""Connections to a NATS server, and what its errors mean to a reader."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.js.api import StreamInfo

from milvus_cdc.errors import BugError, LogResetError, RetryableError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import NatsConfig
from milvus_cdc.source.nats_login import FIELD, SafeClient, login

log = structlog.get_logger()

T = TypeVar("T")

CONNECT_SECONDS = 5
PING_SECONDS = 10
"""A server that answers no ping for twice this long is gone."""
API_SECONDS = 5.0
CLOSE_SECONDS = 3.0
_NO_STREAM = 10059
_NO_JETSTREAM = 10039
_COURTESY = "$js.api.consumer.delete."
_NO_TLS = frozenset(("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"))
"""OpenSSL's reasons for bytes that are no TLS."""
_OTHER_NAME = frozenset((62, 64))
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


class Connection:
    """A connection without reconnection of its own: whoever uses it must learn that it broke."""

    def __init__(self, config: NatsConfig, secrets: SecretResolver | None) -> None:
        self._config = config
        self._secrets = secrets
        self.where = f"NATS at {_redacted(config.url)}"
        self.on_changed: Callable[[], None] | None = None
        """Called when it broke, and when the server denied something."""
        self._client: SafeClient | None = None
        self._field = FIELD
        self._denied = ""
        self._lock = asyncio.Lock()

    @property
    def up(self) -> bool:
        return self._client is not None and self._client.is_connected

    async def get(self) -> Client:
        """The client, connected. Raises RetryableError or UserError."""
        async with self._lock:
            if self._client is None or not self._client.is_connected:
                await self._connect()
            assert self._client is not None
            return self._client

    def raise_denied(self) -> None:
        """The server says only beside its answers that it denies something, and answers nothing."""
        denied, self._denied = self._denied, ""
        if denied:
            raise UserError(
                "QUEUE_ACCESS_DENIED",
                f"{self.where}: {denied}; docs/security-queues.md lists what this user needs",
                field=self._field,
            )

    async def _connect(self) -> None:
        # Not in the event loop: files and secrets may lie on a slow disk.
        terms = await asyncio.to_thread(login, self._config, self._secrets)
        self._field, self._denied = terms.field, ""
        errors: list[Exception] = []

        async def on_error(error: Exception) -> None:
            errors.append(error)
            log.debug("nats client", where=self.where, error=repr(error))
            text = str(error).removeprefix("nats: ")
            # Deleting a consumer is only a courtesy.
            if "permissions violation" in text.lower() and _COURTESY not in text.lower():
                self._denied = text
                await on_changed()

        async def on_changed() -> None:
            if self.on_changed is not None:
                self.on_changed()

        client = SafeClient(certificate=terms.certificate)
        with self.errors(), self._handshake_errors(client):
            try:
                connecting = client.connect(
                    self._config.url,
                    name="milvus-cdc",
                    error_cb=on_error,
                    disconnected_cb=on_changed,
                    closed_cb=on_changed,
                    allow_reconnect=False,
                    # The client tries once more than it is told to, however it is told.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_SECONDS,
                    ping_interval=PING_SECONDS,
                    **terms.options,
                )
                await bounded(connecting, 2 * CONNECT_SECONDS)
                client.check()
            except BaseException as error:
                await _close(client)
                if isinstance(error, nats.errors.NoServersError) and errors:
                    raise errors[-1] from error
                if isinstance(error, ConnectionResetError) and (why := client.why_lost()):
                    raise why from error
                raise
        self._client = client

    @contextlib.contextmanager
    def _handshake_errors(self, client: SafeClient) -> Iterator[None]:
        """While connecting, TLS that fails is a setting; later it is a connection that broke."""
        tls_first = self._config.tls_handshake_first
        try:
            yield
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLCertVerificationError as error:
            part = "server_name" if error.verify_code in _OTHER_NAME else "ca_file"
            raise UserError(
                "QUEUE_AUTHENTICATION_FAILED",
                f"{self.where}: its certificate is refused: {error.verify_message}; mend "
                f"{FIELD}.tls.{part}, or the server",
                field=f"{FIELD}.tls.{part}",
            ) from error
        except ssl.SSLError as error:
            if tls_first and error.reason in _NO_TLS:
                raise UserError(
                    "QUEUE_AUTHENTICATION_FAILED",
                    f"{self.where} speaks before a TLS handshake; take "
                    f"{FIELD}.tls_handshake_first away, or switch TLS on there",
                    field=f"{FIELD}.tls_handshake_first",
                ) from error
            ours = "ALERT" in (error.reason or "")
            field = f"{FIELD}.tls" + (".certificate_file" if ours else "")
            raise UserError(
                "QUEUE_AUTHENTICATION_FAILED",
                f"{self.where}: {'it refuses our certificate' if ours else 'TLS fails'}: "
                f"{error.reason or error}; mend {field}, or the server",
                field=field,
            ) from error
        except (nats.errors.Error, TimeoutError) as error:
            nobody = isinstance(error.__cause__ or error, nats.errors.NoServersError)
            if client.greeted or nobody:
                raise
            # It may as well be one that starts, or a proxy with nothing behind it.
            raise RetryableError(
                "QUEUE_UNREACHABLE",
                f"{self.where} does not greet as a NATS does: see whether it wants "
                f"{'no' if tls_first else 'a'} TLS handshake before ({FIELD}.tls_handshake_first)",
            ) from error

    @contextlib.contextmanager
    def errors(self, pchannel: str = "") -> Iterator[None]:
        """The client's errors as ours."""
        where = self.where
        try:
            yield
        except nats.js.errors.NotFoundError as error:
            if error.err_code == _NO_STREAM and pchannel:
                raise LogResetError(
                    f"stream {pchannel} does not exist at {where}: it was deleted, or the task "
                    "names another queue than the source writes to"
                ) from error
            raise RetryableError("QUEUE_UNREACHABLE", f"{where}: {error}") from error
        except nats.js.errors.BadRequestError as error:
            raise BugError("QUEUE_PROTOCOL", f"{where} refuses a request: {error}") from error
        except nats.js.errors.APIError as error:
            if error.err_code == _NO_JETSTREAM:
                raise UserError(
                    "QUEUE_ACCESS_DENIED",
                    f"{where}: {error.description}: log in as a user of the account that Milvus "
                    "uses",
                    field=self._field,
                ) from error
            raise RetryableError("QUEUE_UNREACHABLE", f"{where}: {error}") from error
        except nats.errors.Error as error:
            if isinstance(error, nats.errors.TimeoutError | nats.errors.NoRespondersError):
                self.raise_denied()
            if _refusal(error):
                raise UserError(
                    "QUEUE_AUTHENTICATION_FAILED",
                    f"{where} refuses the login: {str(error).removeprefix('nats: ')}; "
                    + (
                        "mend it"
                        if self._field != FIELD
                        else "set username and password, token, nkey_seed or credentials_file"
                    ),
                    field=self._field,
                ) from error
            raise RetryableError("QUEUE_UNREACHABLE", f"{where}: {error}") from error
        except (OSError, TimeoutError) as error:
            self.raise_denied()
            raise RetryableError(
                "QUEUE_UNREACHABLE", f"{where}: {error or type(error).__name__}"
            ) from error

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _close(client)


async def bounded(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result, or TimeoutError after `seconds` even if the client's code keeps a cancellation
    to itself: whoever waits for a lock behind it must not wait for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise TimeoutError
    return task.result()


async def _close(client: Client) -> None:
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
        await bounded(client.close(), CLOSE_SECONDS)


async def stream_info(connection: Connection, pchannel: str) -> StreamInfo:
    """Raises LogResetError when there is no such stream."""
    client = await connection.get()
    with connection.errors(pchannel):
        asking = client.jetstream(timeout=API_SECONDS).stream_info(pchannel)
        return await bounded(asking, 2 * API_SECONDS)


def _refusal(error: nats.errors.Error) -> bool:
    if isinstance(error, nats.errors.AuthorizationError):
        return True
    text = str(error).lower()
    # A server that waited too long for our first words says "authentication timeout".
    return "timeout" not in text and ("authorization" in text or "authentication" in text)


def _redacted(url: str) -> str:
    """The address without user, password or token."""
    return urlsplit(url).netloc.rpartition("@")[2] or url.rpartition("@")[2]
