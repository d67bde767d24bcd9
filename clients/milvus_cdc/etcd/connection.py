"""Channels to the members of one etcd cluster, fail-over between them, and what their gRPC errors
mean.

Law: a call has one deadline, whatever the number of endpoints it tries. A write is sent to another
endpoint only when it certainly did not reach the first (the rule of etcd's own client,
`isSafeRetryMutableRPC`); otherwise its outcome is unknown and the caller is told so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from milvus_cdc.errors import (
    BugError,
    CdcError,
    RetryableError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.etcd.records import Compacted

T = TypeVar("T")

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


def to_cdc_error(error: grpc.aio.AioRpcError, endpoint: str, *, write: bool = False) -> CdcError:
    """The error class of a gRPC status from etcd (texts: etcd `api/v3rpc/rpctypes/error.go`)."""
    code, details = error.code(), error.details() or ""
    lowered = details.lower()
    if "has been compacted" in lowered:
        return Compacted(0)
    if (
        code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        or "user name is empty" in lowered
    ):
        return UserError(
            "ETCD_AUTH",
            f"etcd at {endpoint} refuses this client ({details}); it must be served without a user",
        )
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


def _address(endpoint: str) -> str:
    scheme, separator, rest = endpoint.rpartition("://")
    if scheme.lower() not in ("", "http") or (separator and not scheme) or not rest.strip("/"):
        raise UserError(
            "ETCD_ENDPOINT",
            f"endpoint {endpoint!r} is not of the form host:port or http://host:port",
        )
    return rest.rstrip("/")


class Connection:
    """One channel per endpoint, opened when first needed; calls stay with an endpoint until it
    fails.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        if not endpoints:
            raise UserError("ETCD_ENDPOINT", "no etcd endpoint is given")
        self.endpoints = tuple(_address(endpoint) for endpoint in endpoints)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0

    def endpoint(self) -> str:
        return self.endpoints[self._current]

    def next_endpoint(self) -> None:
        self._current = (self._current + 1) % len(self.endpoints)

    def channel(self) -> grpc.aio.Channel:
        """To the current endpoint. This is the one place where channels are made."""
        endpoint = self.endpoint()
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
            self._channels[endpoint] = channel
        return channel

    async def call(
        self,
        attempt: Callable[[grpc.aio.Channel, float], Awaitable[T]],
        timeout_seconds: float,
        *,
        write: bool = False,
    ) -> T:
        """Runs `attempt(channel, timeout)`, over to the next endpoint where that is safe.

        The time left is shared evenly by the endpoints not yet tried, so that a silent one cannot
        use it up.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_seconds
        for tries_left in range(len(self.endpoints), 0, -1):
            endpoint = self.endpoint()
            share = max(0.001, (deadline - clock()) / tries_left)
            try:
                return await attempt(self.channel(), share)
            except grpc.aio.AioRpcError as error:
                failure = to_cdc_error(error, endpoint, write=write)
                cause = error
            if not isinstance(failure, RetryableError) or isinstance(failure, Compacted):
                raise failure from cause
            if self.endpoint() == endpoint:
                self.next_endpoint()
            if isinstance(failure, UnknownOutcomeError):
                raise failure from cause
        raise failure from cause

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()
