"""Indexes of a sink collection: what there is, and one mended.

Law: what serves is released only where the server insists.
"""

from __future__ import annotations

from typing import Any

from milvus_cdc.milvus_client import Refusal
from milvus_cdc.milvus_protos import common_pb2
from milvus_cdc.milvus_status import INDEX_NOT_FOUND
from milvus_cdc.model import Collection, Index
from milvus_cdc.sink.differences import MMAP, TYPE_PARAMS, SeenIndex, index_differs
from milvus_cdc.sink.milvus.calls import Calls
from milvus_cdc.sink.milvus.capabilities import unsupported
from milvus_cdc.sink.milvus.loading import Loading
from milvus_cdc.sink.milvus.schema import parse

ALTERS_INDEXES = (2, 4)


class Indexes:
    """Of one server's collections."""

    def __init__(self, calls: Calls, loading: Loading) -> None:
        self._calls = calls
        self._loading = loading

    async def seen(self, want: Collection) -> dict[str, SeenIndex]:
        try:
            answer = await self._calls.ask("DescribeIndex", want)
        except Refusal as refusal:
            if refusal.code == INDEX_NOT_FOUND or refusal.says("index not found"):
                return {}
            raise self._calls.error(refusal) from refusal
        names = {}
        if not (await self._calls.capabilities()).index_names:
            # It calls each index like its field, whatever name it was given.
            names = {index.field_name: index.name for index in want.indexes}
        return {
            names.get(found.field_name, found.index_name): SeenIndex(
                names.get(found.field_name, found.index_name),
                found.field_name,
                {pair.key: pair.value for pair in found.params},
            )
            for found in answer.index_descriptions
        }

    async def mend(self, want: Collection, name: str) -> None:
        """From where it is to what is wanted, looked at anew: dropped, altered, made."""
        wanted = next((index for index in want.indexes if index.name == name), None)
        found = (await self.seen(want)).get(name)
        if wanted is not None and found is not None and not index_differs(wanted, found):
            if (await self._calls.capabilities()).release >= ALTERS_INDEXES:
                await self._alter(want, wanted)
            return
        if found is not None:
            await self._drop(want, found)
        if wanted is not None:
            await self._create(want, wanted)

    async def _alter(self, want: Collection, index: Index) -> None:
        value = dict(index.params).get(MMAP)
        change: dict[str, Any] = {"delete_keys": [MMAP]}
        if value is not None:
            change = {"extra_params": [common_pb2.KeyValuePair(key=MMAP, value=value)]}
        await self._loading.unloaded_if_told(
            "AlterIndex", want, "loaded", "release", index_name=index.name, **change
        )

    async def _drop(self, want: Collection, found: SeenIndex) -> None:
        names = {"field_name": found.field_name, "index_name": found.name}
        await self._loading.unloaded_if_told("DropIndex", want, "release", **names)

    async def _create(self, want: Collection, index: Index) -> None:
        known = await self._calls.capabilities()
        types = {field.name: field.data_type for field in parse(want).fields}
        if why := known.index_violation(index, types.get(index.field_name, 0)):
            raise unsupported(want, [why])
        params = [
            common_pb2.KeyValuePair(key=key, value=value)
            for key, value in index.params
            if key not in TYPE_PARAMS
        ]
        await self._calls.call(
            "CreateIndex",
            want,
            field_name=index.field_name,
            index_name=index.name,
            extra_params=params,
        )
