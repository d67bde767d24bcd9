"""Calls to a Milvus' public API: address, token, deadlines, and its errors as ours.

Laws: every call has a deadline; every answer's status is looked at; nothing is repeated here. What
leaves is one of milvus_cdc.errors, except Refusal from `ask`, whose caller knows what a code means
to it, and MessageTooLargeError from `write`.
"""

from __future__ import annotations

import base64
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import grpc

from milvus_cdc.channels import Channels
from milvus_cdc.errors import CdcError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import (
    MilvusStatusError,
    Refusal,
    check,
    from_refusal,
    from_rpc,
    too_large,
)
from milvus_cdc.tls import Fields, TlsFiles, diagnose

__all__ = ["CALL_SECONDS", "MessageTooLargeError", "MilvusClient", "MilvusStatusError", "Refusal"]

CALL_SECONDS = 10.0
_MAX_RECEIVE_BYTES = 256 * 2**20
_DEFAULT_PORT = 19530
_DIAGNOSIS_SECONDS = 3.0
_SERVICE = "milvus.proto.milvus.MilvusService"

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    # Milvus refuses pings more often than every 5 s (proxy/service.go, keepalive enforcement).
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default gRPC waits up to two minutes before it looks for a server that was away.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # Clients of one process otherwise share a connection and its flow control.
    ("grpc.use_local_subchannel_pool", 1),
    # A retry policy from DNS could repeat a plain insert.
    ("grpc.service_config_disable_resolution", 1),
)


class MessageTooLargeError(Exception):
    """The server refused a write for its size and executed nothing of it."""


class MilvusClient:
    """One HTTP/2 connection; `close()` it, or use it as an async context manager."""

    def __init__(
        self,
        uri: str,
        token: str | None = None,
        *,
        who: str = "sink",
        tls: TlsFiles | None = None,
    ) -> None:
        """`who` begins the reasons of errors: SINK_UNAVAILABLE, SOURCE_UNAVAILABLE, ... Without
        `tls` an https server is checked by the system's authorities. Raises UserError.
        """
        self.uri = uri
        self._who = who.upper()
        self._address, secure = _parse(uri, self._who)
        self._tls_fields = Fields(f"{who}.milvus.tls") if tls is None else tls.fields
        if tls is None and secure:
            tls = TlsFiles(fields=self._tls_fields)
        if tls is not None and not secure:
            raise UserError(
                f"{self._who}_URI_INVALID",
                f"{self._tls_fields.path or 'TLS'} needs an address of the form "
                f"https://host:port, not {uri}",
                field=self._tls_fields.path,
            )
        self._tls = tls
        self._channels = Channels(self._address, _CHANNEL_OPTIONS, tls)
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.use_token(token)
        self._methods: dict[str, Any] = {}
        self._methods_of: grpc.aio.Channel | None = None

    def use_token(self, token: str | None) -> None:
        """From the next call on."""
        self.metadata = ()
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
        await self._channels.close()

    async def call(
        self, method: str, request: Any, *, timeout: float = CALL_SECONDS, database: str = ""
    ) -> Any:
        """Any method but a write. Raises RetryableError, MilvusStatusError, UserError (TLS_* with
        the field for a connection that cannot come about so).

        `database` is the one whose rights count: Milvus looks for grants in the database that a
        header names, not in the request's (`proxy/privilege_interceptor.go`).
        """
        try:
            return await self.ask(method, request, timeout=timeout, database=database)
        except Refusal as refusal:
            raise self.error(refusal) from refusal

    async def ask(
        self,
        method: str,
        request: Any,
        *,
        timeout: float = CALL_SECONDS,
        database: str = "",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """Like `call`, but a status that is not success is Refusal. `headers` go beside the
        usual ones.
        """
        try:
            with self._channels.use() as channel:
                answer = await self._method(channel, method)(
                    request, timeout=timeout, metadata=(*self._headers(database), *headers)
                )
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(self._who, self.uri, method, error, writes=False)
            raise await self._blame(error, failure) from error
        check(method, answer if isinstance(answer, common_pb2.Status) else answer.status)
        return answer

    def error(self, refusal: Refusal) -> CdcError:
        """What a refusal from `ask` means when it means nothing special."""
        return from_refusal(self._who, self.uri, refusal, writes=False)

    async def write(
        self, method: str, request: bytes, *, timeout: float, database: str = ""
    ) -> Any:
        """Sends a serialized Insert, Upsert or Delete; its MutationResult, status success.

        Raises MessageTooLargeError, UnknownOutcomeError when the rows may or may not be there,
        RetryableError when they are certainly not, UserError.
        """
        try:
            with self._channels.use() as channel:
                answer = await self._write_method(channel, method)(
                    request, timeout=timeout, metadata=self._headers(database)
                )
        except grpc.aio.AioRpcError as error:
            if too_large(error):
                raise MessageTooLargeError(error.details()) from error
            failure = from_rpc(self._who, self.uri, method, error, writes=True)
            if not isinstance(failure, UnknownOutcomeError):
                failure = await self._blame(error, failure)
            raise failure from error
        try:
            check(method, answer.status)
        except Refusal as refusal:
            raise from_refusal(self._who, self.uri, refusal, writes=True) from refusal
        return answer

    def _headers(self, database: str) -> tuple[tuple[str, str], ...]:
        return (*self.metadata, ("dbname", database)) if database else self.metadata

    async def _blame(self, error: grpc.aio.AioRpcError, failure: CdcError) -> CdcError:
        """The same, or what a person has to mend before a connection can come about."""
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return failure
        fault = await diagnose(self._address, self._tls, self._tls_fields, _DIAGNOSIS_SECONDS)
        return fault or failure

    def _known_methods(self, channel: grpc.aio.Channel) -> dict[str, Any]:
        if channel is not self._methods_of:
            self._methods_of, self._methods = channel, {}
        return self._methods

    def _write_method(self, channel: grpc.aio.Channel, method: str) -> Any:
        known = self._known_methods(channel)
        call = known.get(f"{method} bytes")
        if call is None:
            call = known[f"{method} bytes"] = channel.unary_unary(
                f"/{_SERVICE}/{method}",
                request_serializer=None,
                response_deserializer=milvus_pb2.MutationResult.FromString,
            )
        return call

    def _method(self, channel: grpc.aio.Channel, method: str) -> Any:
        known = self._known_methods(channel)
        call = known.get(method)
        if call is None:
            call = known[method] = channel.unary_unary(
                f"/{_SERVICE}/{method}",
                request_serializer=_serialize,
                response_deserializer=_ANSWERS[method]._concrete_class.FromString,
            )
        return call


def _parse(uri: str, who: str) -> tuple[str, bool]:
    """gRPC target and whether to use TLS."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.username:
        raise UserError(
            f"{who}_URI_INVALID",
            f"{uri!r} is not the address of a Milvus: http://host:port or https://host:port, "
            "credentials as a token beside it",
            field=f"{who.lower()}.milvus.uri",
        )
    tls = parts.scheme == "https"
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port or (443 if tls else _DEFAULT_PORT)}", tls


def _serialize(request: Any) -> bytes:
    return bytes(request.SerializeToString())


_ANSWERS: dict[str, Any] = {
    method.name: method.output_type
    for method in milvus_pb2.DESCRIPTOR.services_by_name["MilvusService"].methods
}
