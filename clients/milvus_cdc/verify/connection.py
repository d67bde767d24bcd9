"""The few public Milvus RPCs that a comparison needs, read-only.

Every call has a deadline; errors leave as milvus_cdc.errors. Nothing here loads, creates or
changes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from milvus_cdc.errors import CdcError, RetryableError, UserError

COLLECTION_NOT_FOUND = "COLLECTION_NOT_FOUND"
NOT_LOADED = "NOT_LOADED"
ANSWER_TOO_LARGE = "ANSWER_TOO_LARGE"

_RETRIES = 4
_MAX_MESSAGE_BYTES = 128 * 2**20
_CODE_COLLECTION_NOT_FOUND = 100
_CODE_NOT_LOADED = (101, 103, 201)
"""merr: collection not loaded, collection not fully loaded, partition not loaded (2.3 says 65535
instead)."""
_TRANSIENT_CODES = (1, 2, 3, 5, 9, 10, 22, 503, 901, 902)
"""merr codes that the server itself marks as retriable: not ready, busy, no leader, node lacks or
offline."""


class Reads(Protocol):
    """What verify needs of a Milvus; `token` travels as metadata inside the implementation."""

    async def describe(
        self, database: str, collection: str
    ) -> milvus_pb2.DescribeCollectionResponse: ...

    async def partitions(self, database: str, collection: str) -> list[str]: ...

    async def is_loaded(
        self, database: str, collection: str, partitions: Sequence[str]
    ) -> bool: ...

    async def timestamp(self) -> int:
        """A TSO of this cluster, later than everything it has acknowledged."""
        ...

    async def query(self, request: milvus_pb2.QueryRequest) -> milvus_pb2.QueryResults: ...


class MilvusReads:
    """Reads over a grpc.aio channel which the caller owns; a busy or absent server is asked again
    a few times."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_seconds: float = 30.0,
    ) -> None:
        self._stub: Any = milvus_pb2_grpc.MilvusServiceStub(channel)
        self._metadata = tuple(metadata)
        self._timeout = timeout_seconds

    async def describe(
        self, database: str, collection: str
    ) -> milvus_pb2.DescribeCollectionResponse:
        request = milvus_pb2.DescribeCollectionRequest(db_name=database, collection_name=collection)
        return await self._call("DescribeCollection", request)

    async def partitions(self, database: str, collection: str) -> list[str]:
        request = milvus_pb2.ShowPartitionsRequest(db_name=database, collection_name=collection)
        return sorted((await self._call("ShowPartitions", request)).partition_names)

    async def is_loaded(self, database: str, collection: str, partitions: Sequence[str]) -> bool:
        request = milvus_pb2.GetLoadStateRequest(
            db_name=database, collection_name=collection, partition_names=partitions
        )
        answer = await self._call("GetLoadState", request)
        return bool(answer.state == common_pb2.LoadStateLoaded)

    async def timestamp(self) -> int:
        answer = await self._call("AllocTimestamp", milvus_pb2.AllocTimestampRequest())
        return int(answer.timestamp)

    async def query(self, request: milvus_pb2.QueryRequest) -> milvus_pb2.QueryResults:
        return await self._call("Query", request)

    async def _call(self, method: str, request: Any) -> Any:
        for attempt in range(_RETRIES):
            try:
                return await self._call_once(method, request)
            except RetryableError:
                if attempt == _RETRIES - 1:
                    raise
                await asyncio.sleep(0.3 * 2**attempt)
        raise AssertionError("unreachable")

    async def _call_once(self, method: str, request: Any) -> Any:
        try:
            answer = await getattr(self._stub, method)(
                request, timeout=self._timeout, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as err:
            raise _rpc_error(method, err) from err
        status = answer if isinstance(answer, common_pb2.Status) else answer.status
        if status.code or status.error_code:
            raise _status_error(method, status)
        return answer


def _rpc_error(method: str, err: grpc.aio.AioRpcError) -> CdcError:
    text = f"{method}: {err.details()}"
    if err.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return UserError(ANSWER_TOO_LARGE, text)
    if err.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return UserError("MILVUS_DENIED", f"{text}; check the token and the privileges of its user")
    if err.code() == grpc.StatusCode.UNIMPLEMENTED:
        return UserError("MILVUS_TOO_OLD", f"{text}; the comparison needs Milvus 2.3 or later")
    return RetryableError("MILVUS_UNREACHABLE", text)


def _status_error(method: str, status: common_pb2.Status) -> CdcError:
    text = f"{method}: {status.reason} (code {status.code})"
    if status.code == _CODE_COLLECTION_NOT_FOUND:
        return UserError(COLLECTION_NOT_FOUND, text)
    if status.code in _CODE_NOT_LOADED or "not loaded" in status.reason:
        return UserError(NOT_LOADED, text)
    if "larger than max" in status.reason or "exceeds the limit size" in status.reason:
        return UserError(ANSWER_TOO_LARGE, text)
    if status.code in _TRANSIENT_CODES:
        return RetryableError("MILVUS_BUSY", text)
    return UserError("MILVUS_REFUSED", text)


def channel_options() -> list[tuple[str, int]]:
    """What a channel needs so that an answer of one very wide page fits."""
    return [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
