"""Calls to a Milvus' public API: address, token, deadlines, and its errors as ours.

Law: nothing foreign leaves: every failure is one of milvus_cdc.errors. A write whose answer is
missing is an UnknownOutcomeError unless no connection ever carried it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import grpc

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2_grpc

MIB = 1024 * 1024
MAX_MESSAGE_BYTES = 256 * MIB
CALL_SECONDS = 10.0

COLLECTION_NOT_FOUND = "SINK_COLLECTION_MISSING"

# merr codes (milvus `pkg/util/merr/errors.go`, 2.3 to 2.5).
_CODE_COLLECTION_NOT_FOUND = 100
_CODE_COLLECTION_NOT_LOADED = 101
_CODE_LIMIT_REACHED = (8,)
_TRANSIENT_CODES = frozenset({1, 2, 3, 5, 6, 9, 10, 22, 503, 901, 902, 1801})
_AUTH_CODES = frozenset({1400, 1401, 1402, 1403})
_DENIED_CODES = frozenset({108, 1900})
_PARAMETER_CODES = frozenset({1100, 1101, 1102})


class MilvusStatusError(UserError):
    """Milvus refused for a reason that only a person can mend; `code` is merr's."""

    def __init__(self, reason: str, message: str, code: int) -> None:
        super().__init__(reason, message)
        self.code = code


class MilvusClient:
    """One HTTP/2 connection; `close()` it, or use it as an async context manager."""

    def __init__(self, uri: str, token: str | None = None, *, who: str = "sink") -> None:
        """`who` begins the reasons of errors: SINK_UNAVAILABLE, SOURCE_UNAVAILABLE, ..."""
        self._who = who.upper()
        self.uri = uri
        parts = urlsplit(uri)
        default = 443 if parts.scheme == "https" else 19530
        target = f"{parts.hostname}:{parts.port or default}"
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 3_000),
            # Connections are not shared between clients of one process: each has its own flow control.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if parts.scheme == "https":
            credentials = grpc.ssl_channel_credentials()
            self.channel = grpc.aio.secure_channel(target, credentials, options=options)
        else:
            self.channel = grpc.aio.insecure_channel(target, options=options)
        self.metadata: tuple[tuple[str, str], ...] = ()
        if token:
            encoded = base64.b64encode(token.encode()).decode()
            self.metadata = (("authorization", encoded),)
        self._stub: Any = milvus_pb2_grpc.MilvusServiceStub(self.channel)

    async def __aenter__(self) -> MilvusClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    def raw(
        self, method: str, serialize: Callable[[Any], bytes], parse: Callable[[bytes], Any]
    ) -> Any:
        """A unary call with serializers of one's own."""
        return self.channel.unary_unary(
            f"/milvus.proto.milvus.MilvusService/{method}",
            request_serializer=serialize,
            response_deserializer=parse,
        )

    async def call(self, method: str, request: Any, *, timeout: float = CALL_SECONDS) -> Any:
        """Any method but a write. Raises RetryableError, MilvusStatusError, UserError."""
        try:
            answer = await getattr(self._stub, method)(
                request, timeout=timeout, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self.rpc_error(method, error) from error
        status = answer if isinstance(answer, common_pb2.Status) else answer.status
        self.check(method, status)
        return answer

    def check(self, method: str, status: Any) -> None:
        """Raises what an unsuccessful `common.Status` means."""
        if status.code == 0 and status.error_code == 0:
            return
        raise self.status_error(method, status)

    def status_error(self, method: str, status: Any) -> CdcError:
        code = status.code
        text = f"{method} at {self.uri}: {status.reason} (code {code})"
        lowered = status.reason.lower()
        if (
            status.error_code == common_pb2.RateLimit
            or code in _CODE_LIMIT_REACHED
            or "rate limit" in lowered
        ):
            return RetryableError(f"{self._who}_RATE_LIMITED", text)
        if code == _CODE_COLLECTION_NOT_FOUND or (
            "can't find collection" in lowered or "collection not found" in lowered
        ):
            return MilvusStatusError(f"{self._who}_COLLECTION_MISSING", text, code)
        if code in _AUTH_CODES or "auth check failure" in lowered:
            return MilvusStatusError(
                f"{self._who}_UNAUTHENTICATED", f"{text}; check the token of this task", code
            )
        if code in _DENIED_CODES or "permission deny" in lowered or "privilege" in lowered:
            return MilvusStatusError(
                f"{self._who}_PERMISSION_DENIED", f"{text}; grant its user what it needs", code
            )
        if code in _TRANSIENT_CODES or status.retriable or "service not ready" in lowered:
            return RetryableError(f"{self._who}_NOT_READY", text)
        if "quota" in lowered or "exhausted" in lowered:
            return RetryableError(f"{self._who}_QUOTA", text)
        return MilvusStatusError(f"{self._who}_REFUSED", text, code)

    def rpc_error(
        self, method: str, error: grpc.aio.AioRpcError, *, write: bool = False
    ) -> CdcError:
        """What a failed call means; `write`: whether it happened matters."""
        code = error.code()
        text = f"{method} at {self.uri}: {code.name}: {error.details()}"
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return UserError(
                f"{self._who}_UNAUTHENTICATED", f"{text}; check the token of this task"
            )
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return UserError(
                f"{self._who}_PERMISSION_DENIED", f"{text}; grant its user what it needs"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return UserError(
                f"{self._who}_UNSUPPORTED", f"{text}; is this a Milvus of 2.2 or later?"
            )
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (
            error.details() or ""
        ):
            return UserError(
                f"{self._who}_REQUEST_TOO_LARGE",
                f"{text}; lower writes.bytesPerRequest of the replicators",
            )
        if write and not _never_sent(error):
            return UnknownOutcomeError(f"{self._who}_UNKNOWN_OUTCOME", text)
        return RetryableError(f"{self._who}_UNAVAILABLE", text)


def _never_sent(error: grpc.aio.AioRpcError) -> bool:
    """gRPC fails a call fast when it has no connection: then the request cannot have arrived."""
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and (
        "failed to connect to all addresses" in details
        or "Failed to connect" in details
        or "DNS resolution failed" in details
    )
