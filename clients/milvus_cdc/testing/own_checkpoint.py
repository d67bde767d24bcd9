"""The part of the contract for writers with `own_checkpoint`: theirs is the authority, each change
takes effect once, and who was replaced writes no more.
"""

from __future__ import annotations

import pytest

from milvus_cdc.errors import CdcError
from milvus_cdc.rows import Table
from milvus_cdc.sink.writer import Batch, Checkpoint, Opened, Opening, Writer
from milvus_cdc.testing import samples
from milvus_cdc.testing.harness import Harness, as_state, rows, values
from milvus_cdc.testing.samples import OTHER_VCHANNEL, VCHANNEL, put, reached


class OwnCheckpointContract(Harness):
    """Skipped where the writer does not claim it."""

    async def test_checkpoints_come_back(self) -> None:
        table = self.table()
        async with self.writer() as writer, self.writer() as another:
            _claimed(writer)
            assert _by_vchannel(await writer.open(table, Opening.NEW, 1)) == {}
            await self.write(writer, table, [put(table, rows(table, [1], 1), 1)])
            other = put(table, rows(table, [2], 2), 5, vchannel=OTHER_VCHANNEL)
            await self.write(writer, table, [other])
            # Without rows: source time has passed.
            await writer.write(table, Batch((), (reached(7),)), self.seconds)
            held = _by_vchannel(await another.open(table, Opening.RESUME, 2))
            assert held == {VCHANNEL: reached(7), OTHER_VCHANNEL: reached(5, OTHER_VCHANNEL)}
            assert (await self.state(table)).keys() == {1, 2}

    async def test_parts_without_checkpoints_do_no_harm(self) -> None:
        """Of a writer that says so: refused rows are looked for part by part."""
        table = self.table()
        async with self.writer() as writer:
            _claimed(writer)
            if not writer.capabilities.divisible:
                pytest.skip("divisible is not claimed")
            await writer.open(table, Opening.NEW, 1)
            first = put(table, rows(table, [1, 2], 1), 1)
            second = put(table, rows(table, [2, 3], 2), 2)
            await writer.write(table, Batch((first,)), self.seconds)
            assert _by_vchannel(await writer.open(table, Opening.RESUME, 1)) == {}
            await writer.write(table, Batch((first,)), self.seconds)
            await writer.write(table, Batch((second,)), self.seconds)
            await writer.write(table, Batch((), (reached(2),)), self.seconds)
            assert _by_vchannel(await writer.open(table, Opening.RESUME, 2)) == {
                VCHANNEL: reached(2)
            }
            wanted = [*rows(table, [1], 1), *rows(table, [2, 3], 2)]
            assert await self.state(table) == as_state(wanted)

    async def test_who_was_replaced_writes_no_more(self) -> None:
        table = self.table()
        async with self.writer() as old, self.writer() as new:
            _claimed(old)
            await old.open(table, Opening.NEW, 3)
            await self.write(old, table, [put(table, rows(table, [1], 1), 1)])
            await new.open(table, Opening.RESUME, 4)
            for _ in range(2):
                with pytest.raises(CdcError):
                    await self.write(old, table, [put(table, rows(table, [1, 2], 2), 2)])
            with pytest.raises(CdcError):
                await old.open(table, Opening.RESUME, 3)
            assert await self.state(table) == as_state(rows(table, [1], 1))
            await self.insist(new, table, [put(table, rows(table, [1], 3), 3)])
            assert await self.state(table) == as_state(rows(table, [1], 3))
            assert _by_vchannel(await new.open(table, Opening.RESUME, 5)) == {VCHANNEL: reached(3)}

    async def test_rows_and_checkpoint_are_there_together_or_not_at_all(self) -> None:
        """Whenever a write is cut: the next owner finds the rows of the checkpoint, and goes on
        from there, so that each change takes effect once.
        """
        table = self.table()
        keys = range(40)
        writer = self.make_writer()
        writers = [writer]
        epoch = 1
        try:
            _claimed(writer)
            await writer.open(table, Opening.NEW, epoch)
            await self._step(writer, table, 1)
            at = 1
            for seconds in self.cuts:
                await self.attempt(
                    writers[-1], table, [put(table, rows(table, keys, at + 1), at + 1)], seconds
                )
                writers.append(self.make_writer())
                epoch += 1
                held = _by_vchannel(await writers[-1].open(table, Opening.RESUME, epoch))
                assert held in ({VCHANNEL: reached(at)}, {VCHANNEL: reached(at + 1)})
                at = held[VCHANNEL].resolved_ts - samples.BEGIN
                assert await self.state(table) == as_state(rows(table, keys, at))
            await self._step(writers[-1], table, at + 1)
            seen = await self.history(table)
            if seen is not None:
                once = list(range(1, at + 2))
                assert values(seen) == {key: once for key in keys}
        finally:
            for each in writers:
                await each.close()

    async def _step(self, writer: Writer, table: Table, at: int) -> None:
        await self.insist(writer, table, [put(table, rows(table, range(40), at), at)])
        assert await self.state(table) == as_state(rows(table, range(40), at))


def _claimed(writer: Writer) -> None:
    if not writer.capabilities.own_checkpoint:
        pytest.skip("it keeps no checkpoint")


def _by_vchannel(opened: Opened) -> dict[str, Checkpoint]:
    return {each.vchannel: each for each in opened.checkpoints}
