"""Calls about one collection of a server, with the names that each of them carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink.differences import DEFAULT_PARTITION
from milvus_cdc.sink.milvus.capabilities import Capabilities

DDL_SECONDS = 30.0


class Calls:
    """`capabilities` tells what the server can."""

    def __init__(
        self, client: MilvusClient, capabilities: Callable[[], Awaitable[Capabilities]]
    ) -> None:
        self.client = client
        self.capabilities = capabilities
        self.error = client.error

    async def partitions(self, want: Collection) -> list[str]:
        """By name; what a server without partitions has is the default one."""
        if not (await self.capabilities()).partitions:
            return [DEFAULT_PARTITION]
        return list((await self.call("ShowPartitions", want)).partition_names)

    async def call(self, method: str, want: Collection, **fields: Any) -> Any:
        """As `ask`, a refusal as one of our errors."""
        try:
            return await self.ask(method, want, **fields)
        except Refusal as refusal:
            raise self.error(refusal) from refusal

    async def ask(self, method: str, want: Collection, **fields: Any) -> Any:
        """Raises Refusal as the server said it."""
        request = getattr(milvus_pb2, f"{method}Request")(
            db_name=want.database, collection_name=want.name, **fields
        )
        return await self.client.ask(method, request, timeout=DDL_SECONDS, database=want.database)
