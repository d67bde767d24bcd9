"""A thin asynchronous client of Milvus' public API: channels, credentials, deadlines, errors.

Laws: every call has a deadline; every answer's status is checked; what leaves is one of
milvus_cdc.errors, except MilvusStatusError from `ask`, whose caller knows what a code means to it.
Nothing is repeated here.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import grpc

from milvus_cdc.errors import UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import MilvusStatusError, check, from_rpc, from_status, too_large

_SERVICE = "/milvus.proto.milvus.MilvusService/"
_MAX_RECEIVE_BYTES = 128 * 2**20
_DEFAULT_PORT = 19530

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    # A silent peer is noticed; the interval is the one pymilvus uses, which proxies accept.
    ("grpc.keepalive_time_ms", 55_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default gRPC waits up to two minutes before it looks for a server that was away.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels of one process otherwise share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A retry policy from DNS could repeat a plain insert.
    ("grpc.service_config_disable_resolution", 1),
)


class MessageTooLargeError(Exception):
    """The server refused a request for its size and executed nothing of it."""


class MilvusClient:
    """Connects on first use. `role` begins the reasons of its errors: SINK_UNAVAILABLE."""

    def __init__(
        self,
        uri: str,
        token: str | None = None,
        *,
        role: str = "MILVUS",
        connections: int = 1,
        timeout_seconds: float = 30.0,
    ) -> None:
        self.uri = uri
        self._target, self._tls = _parse_uri(uri, role)
        self._role = role
        self._timeout = timeout_seconds
        self._count = connections
        self._channels: list[grpc.aio.Channel] = []
        self._turn = itertools.count()
        self.metadata: tuple[tuple[str, str], ...] = ()
        """Credentials, for callers that use `channel` with stubs of their own."""
        if token:
            encoded = base64.b64encode(token.encode()).decode()
            self.metadata = (("authorization", encoded),)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        channels, self._channels = self._channels, []
        for channel in channels:
            await channel.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """One of the client's connections; it is closed with the client."""
        if not self._channels:
            self._channels = [self._connect() for _ in range(self._count)]
        return self._channels[next(self._turn) % len(self._channels)]

    async def get_version(self) -> str:
        """The server's version as it says it, for example `v2.3.5`."""
        return str((await self.call("GetVersion", milvus_pb2.GetVersionRequest())).version)

    async def alloc_timestamp(self) -> int:
        """A TSO of this cluster, later than everything it has acknowledged."""
        answer = await self.call("AllocTimestamp", milvus_pb2.AllocTimestampRequest())
        return int(answer.timestamp)

    async def call(
        self,
        method: str,
        request: Any,
        *,
        database: str = "",
        timeout_seconds: float | None = None,
    ) -> Any:
        """The answer of a call that changes no rows; its failure as an error."""
        try:
            return await self.ask(
                method, request, database=database, timeout_seconds=timeout_seconds
            )
        except MilvusStatusError as error:
            raise from_status(self._role, self.uri, error, writes=False) from error

    async def ask(
        self,
        method: str,
        request: Any,
        *,
        database: str = "",
        timeout_seconds: float | None = None,
    ) -> Any:
        """Like `call`, but a status that is not success is MilvusStatusError."""
        try:
            answer = await self._unary(method, _serialize, _answer_class(method).FromString)(
                request, timeout=timeout_seconds or self._timeout, metadata=self._headers(database)
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(self._role, self.uri, method, error, writes=False) from error
        check(method, answer if isinstance(answer, common_pb2.Status) else answer.status)
        return answer

    def error(self, error: MilvusStatusError) -> Exception:
        """What a status from `ask` means when it means nothing special."""
        return from_status(self._role, self.uri, error, writes=False)

    async def mutate(
        self, method: str, request: bytes, *, database: str, timeout_seconds: float
    ) -> Any:
        """Sends a serialized Insert, Upsert or Delete and returns its checked MutationResult.

        Raises MessageTooLargeError when the server takes no message of this size, and
        UnknownOutcomeError when the rows may or may not be there.
        """
        try:
            answer = await self._unary(method, None, milvus_pb2.MutationResult.FromString)(
                request, timeout=timeout_seconds, metadata=self._headers(database)
            )
        except grpc.aio.AioRpcError as error:
            if too_large(error):
                raise MessageTooLargeError(error.details()) from error
            raise from_rpc(self._role, self.uri, method, error, writes=True) from error
        try:
            check(method, answer.status)
        except MilvusStatusError as error:
            raise from_status(self._role, self.uri, error, writes=True) from error
        return answer

    def _unary(self, method: str, serialize: Any, parse: Any) -> Any:
        return self.channel.unary_unary(
            _SERVICE + method, request_serializer=serialize, response_deserializer=parse
        )

    def _headers(self, database: str) -> Sequence[tuple[str, str]]:
        return (*self.metadata, ("dbname", database)) if database else self.metadata

    def _connect(self) -> grpc.aio.Channel:
        if self._tls:
            return grpc.aio.secure_channel(
                self._target, grpc.ssl_channel_credentials(), options=_CHANNEL_OPTIONS
            )
        return grpc.aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS)


def _parse_uri(uri: str, role: str) -> tuple[str, bool]:
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/"):
        raise UserError(f"{role}_URI_INVALID", f"{uri!r} is not http://host:port or https://…")
    tls = parts.scheme == "https"
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port or (443 if tls else _DEFAULT_PORT)}", tls


def _serialize(request: Any) -> bytes:
    return bytes(request.SerializeToString())


_ANSWERS: dict[str, Any] = {
    method.name: method.output_type
    for method in milvus_pb2.DESCRIPTOR.services_by_name["MilvusService"].methods
}


def _answer_class(method: str) -> Any:
    return _ANSWERS[method]._concrete_class
