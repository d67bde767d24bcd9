"""How often keys are stored, and which of them a reader sees.

Facts seen on 2.3.5: `query` shows a doubled key once, `count(*)` each of its rows; the row with key
9223372036854775807 is counted and never returned by a query.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import RetryableError
from milvus_cdc.milvus_client import MilvusClient, MilvusStatusError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import CollectionTarget, Copies
from milvus_cdc.sink.milvus import capabilities as able
from milvus_cdc.sink.milvus import requests

SECONDS = 20.0
_LOADING = 103
_HIDDEN_KEY = 2**63 - 1


async def copies(
    client: MilvusClient,
    known: able.Capabilities,
    target: CollectionTarget,
    partition: str,
    keys: Sequence[Key],
) -> Copies | None:
    """As `Sink.copies`."""
    if not known.count:
        return None
    named = partition and known.partitions and not target.partition_key
    names = [partition] if named else []

    async def ask(expr: str, output: str) -> Any:
        request = milvus_pb2.QueryRequest(
            db_name=target.database,
            collection_name=target.collection,
            partition_names=names,
            expr=expr,
            output_fields=[output],
            consistency_level=common_pb2.ConsistencyLevel.Strong,
        )
        answer = await client.call("Query", request, timeout=SECONDS, database=target.database)
        return answer.fields_data

    async def count(expr: str) -> int:
        return int((await ask(expr, "count(*)"))[0].scalars.long_data.data[0])

    async def seen(expr: str) -> list[Key]:
        for column in await ask(expr, target.key_field):
            if column.field_name == target.key_field:
                scalars = column.scalars
                return [*scalars.long_data.data, *scalars.string_data.data]
        return []

    rows, found = 0, set[Key]()
    try:
        for expr in requests.keys_in(target, _plain(keys), sums=known.constant_sums):
            counted, visible = await asyncio.gather(count(expr), seen(expr))
            rows += counted
            found.update(visible)
        if _HIDDEN_KEY in keys and await count(f"{target.key_field} == {_HIDDEN_KEY}"):
            found.add(_HIDDEN_KEY)
    except MilvusStatusError as error:
        if error.reason != "SINK_NOT_LOADED":
            raise
        if error.code == _LOADING:
            raise RetryableError(error.reason, error.message) from error
        return None
    return Copies(rows, frozenset(found))


def _plain(keys: Sequence[Key]) -> Keys:
    texts = tuple(key for key in keys if isinstance(key, str))
    return texts or np.array(keys, np.int64)
