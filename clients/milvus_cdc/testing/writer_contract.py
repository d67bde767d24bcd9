"""The contract of a `milvus_cdc.sink.writer.Writer`, as tests that an author runs against a sink.

    class TestMine(WriterContract):
        def make_writer(self): return MyWriter({...})
        async def state(self, table): ...  # what a reader of the destination finds

It needs pytest and pytest-asyncio. Hooks: `milvus_cdc.testing.harness.Harness`. What a sink does
not claim (`Capabilities`, the hooks) is skipped; what it claims is tested.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.rows import Changes, Field, Table
from milvus_cdc.sink.writer import Opening
from milvus_cdc.testing import samples
from milvus_cdc.testing.harness import (
    CREATE,
    DELETE,
    UPDATE,
    Harness,
    Seen,
    State,
    as_state,
    key_of,
    rows,
    values,
)
from milvus_cdc.testing.own_checkpoint import OwnCheckpointContract
from milvus_cdc.testing.samples import gone, put
from milvus_cdc.testing.schema_changes import SchemaChangeContract

__all__ = ["Seen", "State", "WriterContract"]

KEYS = pytest.mark.parametrize("key", [samples.KEY, samples.TEXT_KEY], ids=["int64", "varchar"])
STATM = Path("/proc/self/statm")
LARGE_BYTES = 16 * 2**20
FIRST_ATTEMPTS, MORE_ATTEMPTS = 4, 16
FREED_CHECKS = 50
"""An allocator keeps what it once had: memory counts from the second number of attempts on."""


class WriterContract(SchemaChangeContract, OwnCheckpointContract, Harness):
    """Subclass it under a name that begins with `Test`."""

    pytestmark = pytest.mark.asyncio

    # ---- connecting and opening

    async def test_probe_says_what_is_there(self) -> None:
        async with self.writer() as writer:
            assert await writer.probe()

    async def test_it_claims_what_can_be(self) -> None:
        async with self.writer() as writer:
            claims = writer.capabilities
            assert min(claims.rows_per_batch, claims.bytes_per_batch, claims.in_flight) >= 1
            assert claims.linger_seconds >= 0
            assert claims.in_flight == 1 or not claims.own_checkpoint

    async def test_two_collections_of_the_samples_fit_side_by_side(self) -> None:
        async with self.writer() as writer:
            tables = [self.table(), self.table(samples.TEXT_KEY)]
            assert writer.violations(tables) == []
            assert await self.state(tables[0]) == {}

    async def test_what_is_there_already_is_not_taken_as_ones_own(self) -> None:
        """By an opening as NEW: it is refused, or kept apart."""
        if not self.forgets:
            pytest.skip("a log takes records of anybody")
        theirs = self.table()
        await self.put_foreign(theirs)
        before = await self.state(theirs)
        assert before, "put_foreign() left nothing that state() sees"
        mine = self.table(name=theirs.collection)
        async with self.writer() as writer:
            try:
                await writer.open(mine, Opening.NEW, 1)
            except UserError:
                pass
            else:
                await self.write(writer, mine, [put(mine, rows(mine, [5], 5), 1)])
                assert await self.state(mine) == as_state(rows(mine, [5], 5))
        assert await self.state(theirs) == before

    async def test_a_new_beginning_forgets_what_was(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [put(table, rows(table, [1, 2], 1), 5)])
            assert (await writer.open(table, Opening.RECREATE, 2)).checkpoints == ()
            if self.forgets:
                assert await self.state(table) == {}
            await self.write(writer, table, [put(table, rows(table, [2], 2), 3)])
            expected = rows(table, [2], 2) + ([] if self.forgets else rows(table, [1], 1))
            found = await self.state(table)
            # A log may be emptied, where that can be done.
            assert found in (as_state(expected), as_state(rows(table, [2], 2)))

    # ---- rows

    @KEYS
    async def test_rows_are_durable_when_write_returns(self, key: Field) -> None:
        table = self.table(key)
        expected: State = {}
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            for at in range(1, 4):
                made = rows(table, range(10 * at, 10 * at + 15), at)
                await self.write(writer, table, [put(table, made, at, op=CREATE)])
                expected |= as_state(made)
                assert await self.state(table) == expected

    @KEYS
    async def test_changes_of_a_key_take_effect_in_order(self, key: Field) -> None:
        """Across batches, within one, and within one request of the source."""
        table = self.table(key)
        fill = random.Random(5)
        expected: State = {}
        told: list[Seen] = []
        at = 0
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            for _ in range(8):
                batch: list[Changes] = []
                for _ in range(fill.randint(1, 5)):
                    at += 1
                    numbers = [fill.randrange(8) for _ in range(fill.randint(1, 6))]
                    if fill.choice((CREATE, UPDATE, DELETE)) is DELETE:
                        keys = [key_of(table, each) for each in dict.fromkeys(numbers)]
                        batch.append(gone(table, keys, at))
                        told += [Seen(each, None) for each in keys]
                        expected = {k: v for k, v in expected.items() if k not in keys}
                        continue
                    made = rows(table, numbers, at)
                    for place, each in enumerate(made):
                        each["n"] = 1_000 * at + place
                    batch.append(put(table, made, at, op=fill.choice((CREATE, UPDATE))))
                    told += [Seen(each["id"], each) for each in made]
                    expected |= as_state(made)
                await self.write(writer, table, batch)
                assert await self.state(table) == expected
        seen = await self.history(table)
        # Of rows with one key in one request, only the last counts.
        assert seen is None or _last_of_requests(seen) == _last_of_requests(told)

    async def test_writes_of_different_keys_go_side_by_side(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            expected: State = {}
            for at in range(1, 5):
                parts = [
                    rows(table, range(100 * lane, 100 * lane + 20), at)
                    for lane in range(writer.capabilities.in_flight)
                ]
                await asyncio.gather(
                    *(self.write(writer, table, [put(table, part, at)]) for part in parts)
                )
                expected |= {k: v for part in parts for k, v in as_state(part).items()}
            assert await self.state(table) == expected

    async def test_an_empty_batch_is_nothing(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [])
            await self.write(writer, table, [put(table, [], 1), gone(table, [], 2)])
            assert await self.state(table) == {}

    async def test_a_replay_leaves_the_same_end(self) -> None:
        """The owner dies, and the next one begins where the checkpoint says."""
        table = self.table()
        steps = [put(table, rows(table, range(at, at + 10), at), at) for at in range(1, 9)]
        steps.insert(4, gone(table, [2, 5, 11], 5))
        steps = [replace(each, order=at, ts=samples.BEGIN + at) for at, each in enumerate(steps, 1)]
        async with self.writer() as first, self.writer() as second:
            await first.open(table, Opening.NEW, 1)
            for each in steps:
                await self.write(first, table, [each])
            before, told = await self.state(table), await self.history(table)
            opened = await second.open(table, Opening.RESUME, 2)
            durable = max((each.resolved_ts for each in opened.checkpoints), default=0)
            for each in steps[3:]:
                if each.ts > durable:
                    await self.write(second, table, [each])
            assert await self.state(table) == before
            if first.capabilities.own_checkpoint:
                assert await self.history(table) == told

    # ---- no answer, late answers

    async def test_a_write_that_was_cut_is_repeated(self) -> None:
        table = self.table()
        keys = range(50)
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            for at, seconds in enumerate(self.cuts, start=1):
                changes = [put(table, rows(table, keys, at), at)]
                if not await self.attempt(writer, table, changes, seconds):
                    await self.insist(writer, table, changes)
                assert await self.state(table) == as_state(rows(table, keys, at))
            seen = await self.history(table)
            if seen is not None and writer.capabilities.own_checkpoint:
                once = [at for at, _ in enumerate(self.cuts, start=1)]
                assert values(seen) == {key: once for key in keys}

    async def test_a_destination_without_an_answer(self) -> None:
        """The attempt ends in time, the loop stays free, and what is repeated is there."""
        table = self.table()
        slowest = 0.0

        async def watch() -> None:
            nonlocal slowest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.02)
                slowest = max(slowest, time.monotonic() - before)

        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [put(table, rows(table, range(30), 1), 1)])
            second = [put(table, rows(table, range(20), 2), 2)]
            watching = asyncio.create_task(watch())
            await asyncio.sleep(0.05)
            async with self.stalled(table):
                assert not await self.attempt(writer, table, second, 2.0), (
                    "stalled() stalls nothing"
                )
            await asyncio.sleep(0.05)
            watching.cancel()
            assert slowest < 1.5, f"the event loop stood still for {slowest:.1f} s"
            await self.insist(writer, table, second)
            expected = as_state(rows(table, range(30), 1)) | as_state(rows(table, range(20), 2))
            assert await self.state(table) == expected

    async def test_memory_stays_bounded_while_nothing_answers(self) -> None:
        """A batch that was given up is not kept."""
        if sys.platform != "linux":
            pytest.skip("it is measured with /proc")
        table = self.table()
        text = "x" * 30_000
        made = [samples.row(key, 1, f"{text}{key}") for key in range(LARGE_BYTES // len(text))]
        large = [put(table, made, 1)]
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            async with self.stalled(table):
                held = []
                for _ in range(FIRST_ATTEMPTS + MORE_ATTEMPTS):
                    assert not await self.attempt(writer, table, large, 0.2)
                    held.append(_resident())
                most = held[FIRST_ATTEMPTS - 1] + int(MORE_ATTEMPTS * LARGE_BYTES * 0.6)
                # What was given up may take a moment to go.
                kept = _resident()
                for _ in range(FREED_CHECKS):
                    if kept < most:
                        break
                    await asyncio.sleep(0.2)
                    kept = _resident()
                grown = kept - held[FIRST_ATTEMPTS - 1]
            assert kept < most, f"{grown >> 20} MiB are kept"
            await self.insist(writer, table, [put(table, rows(table, [1], 2), 2)])
            assert (await self.state(table))[1]["n"] == 2

    # ---- many, and the end

    async def test_collections_do_not_touch_each_other(self) -> None:
        tables = [self.table() for _ in range(4)]
        async with self.writer() as writer:
            await asyncio.gather(*(writer.open(each, Opening.NEW, 1) for each in tables))

            async def drive(table: Table, number: int) -> None:
                for at in range(1, 6):
                    made = rows(table, range(10), 10 * number + at)
                    await self.write(writer, table, [put(table, made, at)])

            await asyncio.gather(*(drive(each, at) for at, each in enumerate(tables)))
            for number, table in enumerate(tables):
                assert await self.state(table) == as_state(rows(table, range(10), 10 * number + 5))

    async def test_a_heartbeat_does_not_wait(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            if not writer.capabilities.heartbeats:
                pytest.skip("it wants no heartbeats")
            await writer.open(table, Opening.NEW, 1)
            async with asyncio.timeout(1.0), self.stalled(table):
                await writer.heartbeat(table, samples.BEGIN)

    async def test_what_was_released_is_opened_again(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.release(table)
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [put(table, rows(table, [1], 1), 1)])
            await writer.release(table)
            await writer.release(table)
            await writer.open(table, Opening.RESUME, 2)
            await self.write(writer, table, [put(table, rows(table, [2], 2), 2)])
            assert await self.state(table) == as_state(rows(table, [1], 1) + rows(table, [2], 2))

    async def test_it_closes_under_load(self) -> None:
        """Every write ends, and what returned is there."""
        tables = [self.table() for _ in range(3)]
        last = [put(each, rows(each, range(500), 1), 1) for each in tables]
        writer = self.make_writer()
        for each in tables:
            await writer.open(each, Opening.NEW, 1)
        writes = [
            asyncio.create_task(self.write(writer, each, [changes]))
            for each, changes in zip(tables, last, strict=True)
        ]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(self.seconds):
            await writer.close()
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
        async with self.writer() as another:
            for table, changes, outcome in zip(tables, last, outcomes, strict=True):
                expected = as_state(rows(table, range(500), 1))
                if outcome is None:
                    assert await self.state(table) == expected
                else:
                    assert isinstance(outcome, CdcError | asyncio.CancelledError), repr(outcome)
                await another.open(table, Opening.RESUME, 2)
                await self.insist(another, table, [changes])
                assert await self.state(table) == expected

    async def test_a_cancelled_write_leaves_the_writer_usable(self) -> None:
        table = self.table()
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            for at, pause in enumerate((0.0, 0.002, 0.01, 0.03), start=1):
                changes = [put(table, rows(table, range(100), at), at)]
                writing = asyncio.create_task(self.write(writer, table, changes))
                await asyncio.sleep(pause)
                writing.cancel()
                await asyncio.wait({writing}, timeout=self.seconds)
                assert writing.done(), "a cancelled write does not end"
                if not writing.cancelled() and (error := writing.exception()) is not None:
                    assert isinstance(error, RetryableError)
                await self.insist(writer, table, changes)
                assert await self.state(table) == as_state(rows(table, range(100), at))


def _last_of_requests(seen: list[Seen]) -> dict[samples.Key, list[int | None]]:
    found: dict[samples.Key, list[int | None]] = {}
    for key, numbers in values(seen).items():
        kept: list[int | None] = []
        for number in numbers:
            if kept and number is not None and kept[-1] is not None:
                if number // 1_000 == kept[-1] // 1_000:
                    kept.pop()
            kept.append(number)
        found[key] = kept
    return found


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
