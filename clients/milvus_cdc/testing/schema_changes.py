"""The part of the contract about schema changes: in their place among the rows, and idempotent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from milvus_cdc.sink.writer import Opening, SchemaChangeKind
from milvus_cdc.testing import samples
from milvus_cdc.testing.harness import Harness, as_state, rows
from milvus_cdc.testing.samples import put


class SchemaChangeContract(Harness):
    """Every change is asked for twice."""

    async def test_a_renamed_collection_goes_on(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [put(table, rows(table, [1, 2], 1), 1)])
            moved = replace(table, collection=f"{table.collection}_moved")
            old = (table.database, table.collection)
            rename = SchemaChangeKind.RENAME_COLLECTION
            await self.apply(writer, rename, moved, renamed_from=old)
            await self.write(writer, moved, [put(moved, rows(moved, [2, 3], 2), 2)])
            older = rows(table, [1], 1) if writer.capabilities.renames else []
            expected = as_state(older + rows(table, [2, 3], 2))
            assert await self.state(moved) == expected
            # Its old name is free for another one.
            other = self.table(name=table.collection)
            await writer.open(other, Opening.NEW, 1)
            if self.forgets:
                await self.write(writer, other, [put(other, rows(other, [9], 9), 1)])
                assert await self.state(other) == as_state(rows(other, [9], 9))
                assert await self.state(moved) == expected

    async def test_a_dropped_partition_takes_its_rows_with_it(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.apply(writer, SchemaChangeKind.CREATE_PARTITION, table, partition="p")
            await self.write(
                writer,
                table,
                [
                    put(table, rows(table, range(20), 1), 1, partition="p"),
                    put(table, rows(table, range(20, 30), 1), 2),
                ],
            )
            await self.apply(writer, SchemaChangeKind.DROP_PARTITION, table, partition="p")
            left = [] if self.forgets else rows(table, range(20), 1)
            expected = as_state(left + rows(table, range(20, 30), 1))
            assert await self.state(table) == expected
            await self.write(writer, table, [put(table, rows(table, [25], 2), 3)])
            assert await self.state(table) == expected | as_state(rows(table, [25], 2))

    @pytest.mark.parametrize("opened", [True, False], ids=["by its owner", "by another process"])
    async def test_a_dropped_collection_can_be_made_anew(self, opened: bool) -> None:
        table = self.table()
        drop = SchemaChangeKind.DROP_COLLECTION
        async with self.writer() as writer, self.writer() as other:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [put(table, rows(table, [1, 2], 1), 1)])
            await self.apply(writer if opened else other, drop, table)
            if self.forgets:
                assert await self.state(table) == {}
            again = samples.table(table.collection, task_uid=table.task_uid)
            assert (await writer.open(again, Opening.NEW, 2)).checkpoints == ()
            await self.write(writer, again, [put(again, rows(again, [3], 2), 2)])
            kept = [] if self.forgets else rows(table, [1, 2], 1)
            assert await self.state(again) == as_state(kept + rows(again, [3], 2))
