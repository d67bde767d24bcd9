"""The contract finds what it is for: each of these writers breaks one law."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.rows import ChangeOp, Table
from milvus_cdc.sink.memory_writer import DESTINATIONS, Held, MemoryDestination, MemoryWriter
from milvus_cdc.sink.writer import Batch, Opened, Opening, SchemaChange, SchemaChangeKind
from milvus_cdc.testing import samples
from milvus_cdc.testing.writer_contract import Seen, State, WriterContract


class Early(MemoryWriter):
    """Says so before its rows are there."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        asyncio.get_running_loop().call_later(0.05, self._take, table, batch)

    def _take(self, table: Table, batch: Batch) -> None:
        for changes in batch.changes:
            if (held := self._there.held(table)) is not None:
                held.take(table, changes)


class DeletesFirst(MemoryWriter):
    """Sorts a batch by operation."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        changes = sorted(batch.changes, key=lambda each: each.op is not ChangeOp.DELETE)
        await super().write(table, Batch(tuple(changes), batch.checkpoints), timeout_seconds)


class FirstOfAKey(MemoryWriter):
    """Of rows with one key in one request, the first stays."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        parts = []
        for each in batch.changes:
            if each.op is ChangeOp.DELETE:
                parts.append(each)
                continue
            rows: dict[Any, Any] = {}
            for row in each.rows(table):
                rows.setdefault(row["id"], row)
            parts.append(samples.put(table, list(rows.values()), each.order, op=each.op))
        await super().write(table, Batch(tuple(parts), batch.checkpoints), timeout_seconds)


class Appends(MemoryWriter):
    """A delete does nothing."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        kept = tuple(each for each in batch.changes if each.op is not ChangeOp.DELETE)
        await super().write(table, Batch(kept, batch.checkpoints), timeout_seconds)


class Late(MemoryWriter):
    """Waits for as long as it takes."""

    async def _answer(self, timeout_seconds: float) -> None:
        await super()._answer(timeout_seconds + 5)


class Blocking(MemoryWriter):
    """Waits where everybody waits for it."""

    async def _answer(self, timeout_seconds: float) -> None:
        if not self._there.answers.is_set():
            time.sleep(timeout_seconds)  # noqa: ASYNC251
        await super()._answer(0.01)


class Hoarding(MemoryWriter):
    """Keeps what it could not write, to write it later."""

    kept: Sequence[bytes] = ()

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        try:
            await super().write(table, batch, timeout_seconds)
        except RetryableError:
            columns = (column for each in batch.changes for column in each.columns)
            self.kept = [*self.kept, *(bytes(bytearray(column)) for column in columns)]
            raise


class LateArrivals(MemoryWriter):
    """What was cut arrives after what was written since."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        if timeout_seconds < 1:
            asyncio.get_running_loop().call_later(0.01, self._take, table, batch)
            raise RetryableError("SINK_TIMEOUT", "cut")
        await super().write(table, batch, timeout_seconds)
        await asyncio.sleep(0.02)

    def _take(self, table: Table, batch: Batch) -> None:
        if (held := self._there.held(table)) is not None:
            held.take(table, batch.changes[0])
            held.rows.pop(1, None)


class Forgetful(MemoryWriter):
    """Keeps no checkpoint."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        await super().write(table, Batch(batch.changes), timeout_seconds)


class RowsBeforeCheckpoint(MemoryWriter):
    """Two transactions, and a cut falls between them."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        await super().write(table, Batch(batch.changes), timeout_seconds)
        if timeout_seconds < 1:
            raise RetryableError("SINK_TIMEOUT", "cut")
        await super().write(table, Batch((), batch.checkpoints), timeout_seconds)


class Unfenced(MemoryWriter):
    """Everybody may write."""

    def _check(self, table: Table, held: Held, epoch: int) -> None:
        held.epoch = 0


class Greedy(MemoryWriter):
    """What is there by that name is its own."""

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        for key, held in list(self._there.collections.items()):
            if held.name == table.full_name:
                self._there.collections[table.task_uid, table.collection_id] = (
                    self._there.collections.pop(key)
                )
                opening = Opening.ADOPT
        return await super().open(table, opening, epoch)


class Keeping(MemoryWriter):
    """RECREATE is as RESUME."""

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        opening = Opening.ADOPT if opening is Opening.RECREATE else opening
        return await super().open(table, opening, epoch)


class Deaf(MemoryWriter):
    """Schema changes are nothing to it."""

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        pass


class Once(MemoryWriter):
    """A schema change that is done is an error."""

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        there = self._there.held(change.table)
        if change.kind is SchemaChangeKind.DROP_COLLECTION and there is None:
            raise KeyError(change.table.full_name)
        await super().apply(change, timeout_seconds)


class Polite(MemoryWriter):
    """Waits for its writes before it closes, for ever."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        await super().write(table, batch, timeout_seconds)
        self.busy = asyncio.Event()
        await self.busy.wait()


class OneForAll(MemoryWriter):
    """One collection, whatever it is called."""

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        for held in self._there.collections.values():
            for each in batch.changes:
                held.take(table, each)


def contract_of(kind: type[MemoryWriter], own_checkpoint: bool) -> WriterContract:
    name = uuid.uuid4().hex
    there = DESTINATIONS[name] = MemoryDestination()

    class Contract(WriterContract):
        seconds = 2.0

        def make_writer(self) -> MemoryWriter:
            return kind({"destination": name, "own_checkpoint": own_checkpoint})

        async def state(self, table: Table) -> State:
            held = there.held(table)
            return {} if held is None else {key: row for key, (_, row) in held.rows.items()}

        async def history(self, table: Table) -> list[Seen] | None:
            held = there.held(table)
            return [] if held is None else [Seen(*each) for each in held.history]

        def stalled(self, table: Table) -> contextlib.AbstractAsyncContextManager[None]:
            return there.stalled()

    return Contract()


@pytest.mark.parametrize(
    ("kind", "own_checkpoint", "test", "arguments"),
    [
        (Early, False, "rows_are_durable_when_write_returns", (samples.KEY,)),
        (DeletesFirst, False, "changes_of_a_key_take_effect_in_order", (samples.KEY,)),
        (FirstOfAKey, False, "changes_of_a_key_take_effect_in_order", (samples.TEXT_KEY,)),
        (Appends, False, "changes_of_a_key_take_effect_in_order", (samples.KEY,)),
        (Late, False, "a_destination_without_an_answer", ()),
        (Blocking, False, "a_destination_without_an_answer", ()),
        (Hoarding, False, "memory_stays_bounded_while_nothing_answers", ()),
        (LateArrivals, False, "a_write_that_was_cut_is_repeated", ()),
        (Forgetful, True, "checkpoints_come_back", ()),
        (Forgetful, True, "a_replay_leaves_the_same_end", ()),
        (Forgetful, True, "rows_and_checkpoint_are_there_together_or_not_at_all", ()),
        (RowsBeforeCheckpoint, True, "rows_and_checkpoint_are_there_together_or_not_at_all", ()),
        (RowsBeforeCheckpoint, True, "a_write_that_was_cut_is_repeated", ()),
        (Unfenced, True, "who_was_replaced_writes_no_more", ()),
        (Greedy, False, "what_is_there_already_is_not_taken_as_ones_own", ()),
        (Keeping, False, "a_new_beginning_forgets_what_was", ()),
        (Keeping, True, "a_new_beginning_forgets_what_was", ()),
        (Deaf, False, "a_dropped_partition_takes_its_rows_with_it", ()),
        (Deaf, False, "a_dropped_collection_can_be_made_anew", (True,)),
        (Deaf, False, "a_renamed_collection_goes_on", ()),
        (Once, False, "a_dropped_collection_can_be_made_anew", (False,)),
        (Polite, False, "it_closes_under_load", ()),
        (OneForAll, False, "collections_do_not_touch_each_other", ()),
    ],
)
async def test_a_broken_law_is_found(
    kind: type[MemoryWriter], own_checkpoint: bool, test: str, arguments: tuple[Any, ...]
) -> None:
    broken = contract_of(kind, own_checkpoint)
    sound = contract_of(MemoryWriter, own_checkpoint)
    await getattr(sound, f"test_{test}")(*arguments)
    with pytest.raises((AssertionError, TimeoutError, KeyError, CdcError, pytest.fail.Exception)):
        async with asyncio.timeout(20):
            await getattr(broken, f"test_{test}")(*arguments)
