"""Connections to a NATS server, and what its errors mean to a reader."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.js.api import StreamInfo

from milvus_cdc.errors import BugError, LogResetError, RetryableError, UserError

log = structlog.get_logger()

T = TypeVar("T")

CONNECT_SECONDS = 5
PING_SECONDS = 10
"""A server that answers no ping for twice this long is gone."""
API_SECONDS = 5.0
CLOSE_SECONDS = 3.0
_NO_STREAM = 10059


class Connection:
    """A connection without reconnection of its own: whoever uses it must learn that it broke."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.on_closed: Callable[[], None] | None = None
        self._client: Client | None = None
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

    async def _connect(self) -> None:
        errors: list[Exception] = []

        async def on_error(error: Exception) -> None:
            errors.append(error)
            log.debug("nats client", url=_redacted(self.url), error=repr(error))

        async def on_closed() -> None:
            if self.on_closed is not None:
                self.on_closed()

        client = Client()
        with foreign_errors(self.url):
            try:
                connecting = client.connect(
                    self.url,
                    name="milvus-cdc",
                    error_cb=on_error,
                    disconnected_cb=on_closed,
                    closed_cb=on_closed,
                    allow_reconnect=False,
                    # The client tries once more than it is told to, however it is told.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_SECONDS,
                    ping_interval=PING_SECONDS,
                )
                await bounded(connecting, 2 * CONNECT_SECONDS)
            except BaseException as error:
                await _close(client)
                if isinstance(error, nats.errors.NoServersError) and errors:
                    raise errors[-1] from error
                raise
        self._client = client

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


async def stream_info(client: Client, url: str, pchannel: str) -> StreamInfo:
    """Raises LogResetError when there is no such stream."""
    with foreign_errors(url, pchannel):
        asking = client.jetstream(timeout=API_SECONDS).stream_info(pchannel)
        return await bounded(asking, 2 * API_SECONDS)


@contextlib.contextmanager
def foreign_errors(url: str, pchannel: str = "") -> Iterator[None]:
    where = f"NATS at {_redacted(url)}"
    try:
        yield
    except nats.js.errors.NotFoundError as error:
        if error.err_code == _NO_STREAM and pchannel:
            raise LogResetError(
                f"stream {pchannel} does not exist at {where}: it was deleted, or the task names "
                "another queue than the source writes to"
            ) from error
        raise RetryableError("QUEUE_UNREACHABLE", f"{where}: {error}") from error
    except nats.js.errors.BadRequestError as error:
        raise BugError("QUEUE_PROTOCOL", f"{where} refuses a request: {error}") from error
    except nats.errors.Error as error:
        if (
            isinstance(error, nats.errors.AuthorizationError)
            or "authorization" in str(error).lower()
        ):
            raise UserError(
                "QUEUE_ACCESS_DENIED",
                f"{where} refuses the credentials; mend them in the url",
                field="source.nats.url",
            ) from error
        raise RetryableError("QUEUE_UNREACHABLE", f"{where}: {error}") from error
    except (OSError, TimeoutError) as error:
        raise RetryableError(
            "QUEUE_UNREACHABLE", f"{where}: {error or type(error).__name__}"
        ) from error


def _redacted(url: str) -> str:
    """The address without user, password or token."""
    return urlsplit(url).netloc.rpartition("@")[2] or url.rpartition("@")[2]
