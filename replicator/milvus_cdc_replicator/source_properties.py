"""A collection's properties as the source's public API tells them.

Law: asked anew when the metadata shows a change, and once more a little later, because the API may
be behind the metadata by a moment; in between the answer stands.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from milvus_cdc.errors import RetryableError
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import Collection

Properties = tuple[tuple[str, str], ...]
LOOKS = 2


class SourceProperties:
    """Of one collection; `client` opens the shared connection to the source."""

    def __init__(self, client: Callable[[], Awaitable[MilvusClient]]) -> None:
        self._client = client
        self._known: Properties = ()
        self._alter_ts = 0
        self._looks = 0

    @property
    def unconfirmed(self) -> bool:
        return self._alter_ts != 0 and self._looks < LOOKS

    async def of(self, want: Collection, database: str) -> Properties:
        """Raises RetryableError, UserError when the source does not tell; `database` is that of the
        collection there.
        """
        if want.alter_ts != self._alter_ts or not want.alter_ts:
            self._looks = 0
        if self._looks >= LOOKS:
            return self._known
        client = await self._client()
        # By its id: its name may change at any moment.
        request = milvus_pb2.DescribeCollectionRequest(
            db_name=database, collectionID=want.collection_id
        )
        answer = await client.call("DescribeCollection", request, database=database)
        if answer.collectionID != want.collection_id:
            raise RetryableError(
                "SOURCE_COLLECTION_MISSING",
                f"the source does not show {want.full_name} under its id {want.collection_id}",
            )
        self._known = tuple(sorted((pair.key, pair.value) for pair in answer.properties))
        self._alter_ts = want.alter_ts
        self._looks += 1
        return self._known
