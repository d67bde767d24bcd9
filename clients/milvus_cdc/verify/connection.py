"""The few public Milvus calls that a comparison needs, read-only, over a MilvusClient.

Nothing here loads, creates or changes anything. A busy or absent server is asked again a few times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.milvus_client import MilvusClient, MilvusStatusError
from milvus_cdc.sink.milvus.capabilities import DEFAULT_PARTITION, Capabilities, ask

if TYPE_CHECKING:
    from pymilvus.grpc_gen import common_pb2, milvus_pb2
else:
    from milvus_cdc.milvus_protos import common_pb2, milvus_pb2

COLLECTION_NOT_FOUND = "COLLECTION_NOT_FOUND"
NOT_LOADED = "NOT_LOADED"
ANSWER_TOO_LARGE = "ANSWER_TOO_LARGE"

_RETRIES = 4
_LOADING_SECONDS = 30.0
_QUERY_SECONDS = 30.0
_CODE_COLLECTION_NOT_FOUND = 100
_CODES_NOT_LOADED = (101, 103, 201)
"""merr: collection not loaded, not fully loaded, partition not loaded (2.3 says 65535)."""


class Reads(Protocol):
    """What a comparison asks of a Milvus. Errors: RetryableError, and UserError with the reasons
    COLLECTION_NOT_FOUND, NOT_LOADED and ANSWER_TOO_LARGE where they apply."""

    async def describe(
        self, database: str, collection: str
    ) -> milvus_pb2.DescribeCollectionResponse: ...

    async def partitions(self, database: str, collection: str) -> list[str]: ...

    async def is_loaded(
        self, database: str, collection: str, partitions: Sequence[str]
    ) -> bool: ...

    async def timestamp(self) -> int:
        """A TSO of this cluster, later than everything it has acknowledged; 0 where the cluster has
        no time of its own and shows everything at once.
        """
        ...

    async def capabilities(self) -> Capabilities: ...

    async def query(self, request: milvus_pb2.QueryRequest) -> milvus_pb2.QueryResults: ...


class MilvusReads:
    """The reads of one cluster; the caller owns and closes the client."""

    def __init__(self, client: MilvusClient) -> None:
        self._client = client
        self._capabilities: Capabilities | None = None

    async def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self._capabilities = await ask(self._client)
        return self._capabilities

    async def describe(
        self, database: str, collection: str
    ) -> milvus_pb2.DescribeCollectionResponse:
        request = milvus_pb2.DescribeCollectionRequest(db_name=database, collection_name=collection)
        return await self._call("DescribeCollection", request)

    async def partitions(self, database: str, collection: str) -> list[str]:
        if not (await self.capabilities()).partitions:
            return [DEFAULT_PARTITION]
        request = milvus_pb2.ShowPartitionsRequest(db_name=database, collection_name=collection)
        return sorted((await self._call("ShowPartitions", request)).partition_names)

    async def is_loaded(self, database: str, collection: str, partitions: Sequence[str]) -> bool:
        request = milvus_pb2.GetLoadStateRequest(
            db_name=database, collection_name=collection, partition_names=partitions
        )
        deadline = time.monotonic() + _LOADING_SECONDS
        while True:
            answer = await self._call("GetLoadState", request)
            if answer.state != common_pb2.LoadStateLoading or time.monotonic() > deadline:
                return bool(answer.state == common_pb2.LoadStateLoaded)
            # It was asked for and is on its way: no reason to give up.
            await asyncio.sleep(0.3)

    async def timestamp(self) -> int:
        if not (await self.capabilities()).timestamps:
            return 0
        answer = await self._call("AllocTimestamp", milvus_pb2.AllocTimestampRequest())
        return int(answer.timestamp)

    async def query(self, request: milvus_pb2.QueryRequest) -> milvus_pb2.QueryResults:
        return await self._call("Query", request)

    async def _call(self, method: str, request: Any) -> Any:
        for attempt in range(_RETRIES):
            try:
                return await self._client.call(method, request, timeout=_QUERY_SECONDS)
            except UserError as err:
                raise _as_ours(err) from err
            except RetryableError:
                if attempt == _RETRIES - 1:
                    raise
                await asyncio.sleep(0.3 * 2**attempt)
        raise AssertionError("unreachable")


def _as_ours(err: UserError) -> UserError:
    """The errors that a comparison can deal with, under one reason each."""
    code = err.code if isinstance(err, MilvusStatusError) else 0
    text = err.message.lower()
    if code == _CODE_COLLECTION_NOT_FOUND:
        return UserError(COLLECTION_NOT_FOUND, err.message)
    if code in _CODES_NOT_LOADED or "not loaded" in text:
        return UserError(NOT_LOADED, err.message)
    if "larger than max" in text or "exceeds the limit size" in text:
        return UserError(ANSWER_TOO_LARGE, err.message)
    return err
