"""Channels to the members of one etcd cluster, fail-over between them, and what their gRPC errors
mean.

Law: a call has one deadline, whatever the number of endpoints it tries. A write is sent to another
endpoint only when it certainly did not reach the first (the rule of etcd's own client,
`isSafeRetryMutableRPC`); otherwise its outcome is unknown and the caller is told so. A refused
token is replaced within the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio

from milvus_cdc.channels import Channels
from milvus_cdc.errors import (
    BugError,
    CdcError,
    RetryableError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.etcd.login import EtcdSecurity, Metadata, Tokens, token_refused
from milvus_cdc.etcd.records import Compacted
from milvus_cdc.tls import Fields, diagnose

T = TypeVar("T")

Attempt: TypeAlias = Callable[[grpc.aio.Channel, float, Metadata], Awaitable[T]]
"""One call: on this channel, within so many seconds, with this metadata."""

MAX_MESSAGE_BYTES = 128 * 1024 * 1024
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # etcd answers "too many pings" below 5 s (--grpc-keepalive-min-time).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A restarted etcd is found again within a second instead of gRPC's default of up to two
    # minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # what one attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Two clients of one process must not share a connection, or closing one would disturb the
    # other.
    ("grpc.use_local_subchannel_pool", 1),
)

_TOKENS_A_CALL = 3

_TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def not_sent(error: grpc.aio.AioRpcError) -> bool:
    """The request cannot have reached a server."""
    return (
        error.code() is grpc.StatusCode.UNAVAILABLE
        and "failed to connect" in (error.details() or "").lower()
    )


def to_cdc_error(
    error: grpc.aio.AioRpcError, endpoint: str, fields: Fields, *, write: bool = False
) -> CdcError:
    """The error class of a gRPC status from etcd (texts: etcd `api/v3rpc/rpctypes/error.go`);
    `fields` is where its settings stand.
    """
    code, details = error.code(), error.details() or ""
    lowered = details.lower()
    if "has been compacted" in lowered:
        return Compacted(0)
    if "user name is empty" in lowered:
        return refused(endpoint, f"it wants a user: {details}", fields)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return refused(endpoint, details, fields)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UserError(
            "ETCD_PROTOCOL",
            f"{endpoint} does not speak etcd's v3 API ({details}); check the endpoint",
        )
    if "database space exceeded" in lowered:
        return RetryableError(
            "ETCD_NO_SPACE",
            f"etcd at {endpoint} is over its quota; compact, defragment, disarm its NOSPACE alarm",
        )
    if code in _TRANSIENT or "future revision" in lowered:
        message = f"etcd at {endpoint} did not answer: {code.name} {details}"
        if write and not not_sent(error):
            return UnknownOutcomeError("ETCD_UNAVAILABLE", message)
        return RetryableError("ETCD_UNAVAILABLE", message)
    return BugError("ETCD_REQUEST", f"etcd at {endpoint} rejects a request: {code.name} {details}")


def refused(endpoint: str, why: str, fields: Fields) -> UserError:
    name = fields.name("username")
    return UserError(
        "ETCD_AUTH",
        f"{name}: etcd at {endpoint} refuses this client ({why}); name a user whose role may do it",
        field=name,
    )


def _address(endpoint: str, security: EtcdSecurity) -> str:
    scheme, separator, rest = endpoint.rpartition("://")
    expected = "http" if security.tls is None else "https"
    if scheme.lower() not in ("", expected) or (separator and not scheme) or not rest.strip("/"):
        name = security.fields.name("endpoints")
        raise UserError(
            "ETCD_ENDPOINT",
            f"{name}: endpoint {endpoint!r} is not of the form host:port or {expected}://host:port",
            field=name,
        )
    return rest.rstrip("/")


class Connection:
    """One channel per endpoint, opened when first needed; calls stay with an endpoint until it
    fails.
    """

    def __init__(self, endpoints: Sequence[str], security: EtcdSecurity) -> None:
        if not endpoints:
            raise UserError("ETCD_ENDPOINT", "no etcd endpoint is given")
        self.endpoints = tuple(_address(endpoint, security) for endpoint in endpoints)
        self.fields = security.fields
        self._security = security
        self._tokens = Tokens(security) if security.username else None
        self._channels: dict[str, Channels] = {}
        self._current = 0

    @property
    def logs_in(self) -> bool:
        return self._tokens is not None

    def endpoint(self) -> str:
        return self.endpoints[self._current]

    def next_endpoint(self) -> None:
        self._current = (self._current + 1) % len(self.endpoints)

    def use(self) -> AbstractContextManager[grpc.aio.Channel]:
        """A channel to the current endpoint. This is the one place where channels are made."""
        endpoint = self.endpoint()
        channels = self._channels.get(endpoint)
        if channels is None:
            channels = Channels(endpoint, _CHANNEL_OPTIONS, self._security.tls)
            self._channels[endpoint] = channels
        return channels.use()

    async def metadata(self, channel: grpc.aio.Channel, seconds: float) -> Metadata:
        """Of calls on this channel. Raises CdcError."""
        if self._tokens is None:
            return ()
        endpoint = self.endpoint()
        try:
            return await self._tokens.get(channel, endpoint, seconds)
        except grpc.aio.AioRpcError as error:
            raise to_cdc_error(error, endpoint, self.fields) from error
        except TimeoutError as error:
            raise RetryableError(
                "ETCD_UNAVAILABLE", f"etcd at {endpoint} did not answer a login in time"
            ) from error

    async def call(self, attempt: Attempt[T], timeout_seconds: float, *, write: bool = False) -> T:
        """Runs `attempt`, over to the next endpoint where that is safe.

        The time left is shared evenly by the endpoints not yet tried, so that a silent one cannot
        use it up.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_seconds
        for tries_left in range(len(self.endpoints), 0, -1):
            endpoint = self.endpoint()
            share = max(0.001, (deadline - clock()) / tries_left)
            try:
                return await self._try(attempt, share, write)
            except RetryableError as error:
                if isinstance(error, Compacted):
                    raise
                failure = error
            if self.endpoint() == endpoint:
                self.next_endpoint()
            if isinstance(failure, UnknownOutcomeError):
                raise failure
        fault = await self.blame(endpoint, failure, deadline - clock())
        if fault is not None:
            raise fault from failure
        raise failure

    async def blame(self, endpoint: str, failure: CdcError, seconds: float) -> UserError | None:
        """What a person has to mend before this endpoint can answer; None when it may by itself."""
        why = failure.__cause__
        if not isinstance(why, grpc.aio.AioRpcError):
            return None
        if why.code() is not grpc.StatusCode.UNAVAILABLE:
            return None
        tls, fields = self._security.tls, self._security.tls_fields
        return await diagnose(endpoint, tls, fields, seconds)

    async def _try(self, attempt: Attempt[T], seconds: float, write: bool) -> T:
        """On the current endpoint. Raises CdcError."""
        endpoint = self.endpoint()
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        with self.use() as channel:
            for _ in range(_TOKENS_A_CALL):
                metadata = await self.metadata(channel, seconds)
                try:
                    return await attempt(channel, max(0.001, until - clock()), metadata)
                except grpc.aio.AioRpcError as error:
                    if self._tokens is None or not token_refused(error):
                        raise to_cdc_error(error, endpoint, self.fields, write=write) from error
                    self._tokens.forget(metadata)
        raise RetryableError(
            "ETCD_UNAVAILABLE", f"etcd at {endpoint} refuses the tokens that it gives"
        )

    async def close(self) -> None:
        if self._tokens is not None:
            await self._tokens.close()
        channels, self._channels = self._channels, {}
        for each in channels.values():
            await each.close()
