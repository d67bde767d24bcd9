"""After the loss of an owner: what its late requests did at the sink is found and mended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.codec.messages import Insert
from milvus_cdc.codec.msgstream import decode
from milvus_cdc.errors import RetryableError
from milvus_cdc.milvus_protos import common_pb2
from milvus_cdc.model import Load, LoadKind
from milvus_cdc.sink import DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.source import LogEntry, LogReader
from milvus_cdc_replicator import recount
from milvus_cdc_replicator.report import Recounted, to_progress
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.spec import Recount
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.unit.replicator.test_runner import (
    PCHANNEL,
    START,
    VCHANNEL,
    Bench,
    failure,
    insert,
    tick,
    until,
)

HORIZON = START + 50
"""What the lost owner was granted."""


def delete(ts: int, keys: list[int]) -> bytes:
    message = log_pb2.LogDelete(
        base=log_pb2.LogBase(msg_type=common_pb2.Delete, timestamp=ts),
        shard_name=VCHANNEL,
        collection_id=7,
        partition_id=-1,
        timestamps=[ts] * len(keys),
        num_rows=len(keys),
    )
    message.primary_keys.int_id.data.extend(keys)
    return message.SerializeToString()


class Fleet(Bench):
    """One owner after the other, as a controller assigns them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(horizon_ts=HORIZON, **options)
        self.loaded(True)
        self.checkpoint = self.runner.assignment.lanes[0]

    def loaded(self, loaded: bool) -> None:
        load = Load(LoadKind.COLLECTION if loaded else LoadKind.NONE, (), 1)
        assignment = self.runner.assignment
        self.runner = self._owner(replace(assignment, want=replace(assignment.want, load=load)))

    def stored(self) -> None:
        """A report comes to the controller: checkpoints never go back."""
        lane = self.runner.report().lanes[0]
        if lane.resolved_ts >= self.checkpoint.resolved_ts:
            self.checkpoint = replace(
                self.checkpoint, read_from=lane.read_from, resolved_ts=lane.resolved_ts
            )

    def grant(self, horizon_ts: int) -> None:
        self.checkpoint = replace(self.checkpoint, horizon_ts=horizon_ts)
        self.runner.grant([(VCHANNEL, horizon_ts)])

    async def lose_owner(self) -> None:
        """Its last checkpoint stays the one that was stored."""
        await self.runner.stop()
        self.begun = self.checkpoint = replace(self.checkpoint, horizon_ts=HORIZON)

    def take_over(self, wanted: Recount = Recount.WANTED) -> CollectionRunner:
        lane = self.checkpoint
        if wanted is Recount.WRITE_AGAIN:
            lane = replace(lane, read_from=self.begun.read_from, resolved_ts=self.begun.resolved_ts)
        elif wanted is Recount.WANTED:
            lane = replace(
                lane, recount_from=self.begun.read_from, recount_ts=self.begun.resolved_ts
            )
        owner = self.next_owner(opened=True, lanes=(lane,), recount=wanted)
        owner.start()
        return owner

    async def late(self, payload: bytes) -> None:
        """A request of the lost owner takes effect."""
        message = decode(LogEntry(b"", payload))
        target = self.sink.target(self.runner.assignment.want)
        if isinstance(message, Insert):
            chunk = RowChunk(message.columns, message.num_rows)
            await self.sink.write(target, RowBatch(Op.INSERT, "_default", (chunk,)), 5)
        else:
            await self.sink.write(target, DeleteBatch("_default", message.keys), 5)  # type: ignore[union-attr]

    async def ended(self) -> Recounted:
        await until(lambda: self.runner.report().recounted is not Recounted.NOT_YET)
        return self.runner.report().recounted

    def texts(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for row in self.sink.rows("default", "c"):
            found.setdefault(row["id"], []).append(row["text"])
        return found

    async def through(self, ts: int) -> None:
        await until(lambda: self.resolved_ts >= ts)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recount, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(recount, "TRY_AGAIN_SECONDS", 0.01)


@contextlib.asynccontextmanager
async def taken_over(*log: bytes, **options: Any) -> AsyncIterator[Fleet]:
    """The first owner wrote the log, its last reports did not arrive; the second has, too."""
    fleet = Fleet(**options)
    await fleet.start()
    try:
        fleet.append(tick(START + 1))
        await fleet.through(START + 1)
        fleet.stored()
        fleet.append(*log, tick(START + 20))
        await fleet.through(START + 20)
        await fleet.lose_owner()
        fleet.take_over()
        await fleet.through(START + 20)
        yield fleet
    finally:
        await fleet.runner.stop()
        await fleet.connections.close()
        assert fleet.budget.held == 0, "memory is given back"


ROWS = insert(START + 5, [1, 2, 3], "old")
NEWER = insert(START + 30, [8], "new")


async def test_without_a_late_request_nothing_is_written_again() -> None:
    async with taken_over(ROWS) as fleet:
        await asyncio.sleep(0.5)
        assert fleet.runner.report().recounted is Recounted.NOT_YET, "the window is still open"
        writes = len(fleet.sink.writes)
        fleet.append(NEWER, tick(START + 60))
        assert await fleet.ended() is Recounted.DONE
        assert len(fleet.sink.writes) == writes + 1
        assert to_progress(fleet.runner.report(), 1).recounted == pb.RECOUNTED_DONE


async def test_nothing_is_counted_before_late_requests_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recount, "SETTLE_SECONDS", 9.0)
    async with taken_over(ROWS) as fleet:
        fleet.append(tick(START + 60))
        await fleet.through(START + 60)
        await asyncio.sleep(1.2)
        assert fleet.runner.report().recounted is Recounted.NOT_YET


async def test_after_a_clean_hand_over_nothing_is_counted() -> None:
    async with taken_over(ROWS) as fleet:
        await fleet.lose_owner()
        fleet.take_over(Recount.NONE)
        await fleet.through(START + 20)
        await fleet.late(ROWS)
        fleet.append(tick(START + 60))
        await fleet.through(START + 60)
        await asyncio.sleep(1.2)
        assert fleet.runner.report().recounted is Recounted.NOT_YET
        assert fleet.count() == 6


async def mended(fleet: Fleet, wanted: dict[int, list[str]]) -> None:
    """Found wrong, and right after everything since was written once more."""
    assert await fleet.ended() is Recounted.WRITE_AGAIN
    assert to_progress(fleet.runner.report(), 1).recounted == pb.RECOUNTED_WRITE_AGAIN
    assert fleet.runner.report().state == "RUNNING", "rows go on meanwhile"
    fleet.stored()
    before = fleet.checkpoint
    await fleet.runner.stop()
    fleet.append(tick(START + 120))
    fleet.take_over(Recount.WRITE_AGAIN)
    assert await fleet.ended() is Recounted.DONE
    assert fleet.texts() == wanted
    assert not fleet.runner.report().conditions
    fleet.stored()
    assert fleet.checkpoint.resolved_ts >= before.resolved_ts


async def test_a_late_insert_doubles_keys_and_is_mended() -> None:
    async with taken_over(ROWS) as fleet:
        await fleet.late(ROWS)
        assert fleet.count() == 6
        fleet.append(tick(START + 60))
        await mended(fleet, {1: ["old"], 2: ["old"], 3: ["old"]})


async def test_an_older_value_beside_a_newer_one_goes() -> None:
    async with taken_over(ROWS, insert(START + 10, [2], "middle")) as fleet:
        fleet.append(
            insert(START + 56, [3], "newest"), delete(START + 56, [3]), NEWER, tick(START + 60)
        )
        fleet.grant(START + 99)
        await fleet.through(START + 60)
        await fleet.late(ROWS)
        await mended(fleet, {1: ["old"], 2: ["middle"], 3: ["newest"], 8: ["new"]})


async def test_a_deleted_key_that_came_back_goes_again() -> None:
    async with taken_over(ROWS, delete(START + 8, [1])) as fleet:
        fleet.append(delete(START + 56, [2]), tick(START + 60))
        fleet.grant(START + 99)
        await fleet.through(START + 60)
        await fleet.late(insert(START + 5, [1, 2], "old"))
        assert fleet.count() == 3
        await mended(fleet, {3: ["old"]})


async def test_a_row_that_a_late_delete_took_is_brought_back() -> None:
    gone = delete(START + 8, [1, 2])
    async with taken_over(ROWS, gone, insert(START + 9, [1], "again")) as fleet:
        fleet.append(insert(START + 56, [2], "later"), tick(START + 60))
        fleet.grant(START + 99)
        await fleet.through(START + 60)
        await fleet.late(gone)
        await mended(fleet, {1: ["again"], 2: ["later"], 3: ["old"]})


async def test_keys_that_the_source_doubles_are_no_fault() -> None:
    async with taken_over(ROWS) as fleet:
        fleet.append(insert(START + 56, [2], "twice"), tick(START + 60))
        fleet.grant(START + 99)
        assert await fleet.ended() is Recounted.DONE
        assert fleet.texts()[2] == ["old", "twice"]


async def test_rows_that_go_on_meanwhile_are_no_fault() -> None:
    async with taken_over(ROWS) as fleet:
        entered, leave, looked = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def hold(*_: Any) -> None:
            entered.set()
            await leave.wait()

        async def look() -> None:
            looked.set()
            await entered.wait()

        fleet.sink.before_write, fleet.sink.before_copies = hold, look
        fleet.grant(START + 99)
        fleet.append(tick(START + 52), delete(START + 55, [1]), tick(START + 71))
        await looked.wait()
        await asyncio.sleep(0.3)
        leave.set()
        assert await fleet.ended() is Recounted.DONE
        assert set(fleet.texts()) == {2, 3}


async def test_a_second_loss_in_the_window_loses_no_key() -> None:
    async with taken_over(ROWS) as fleet:
        fleet.append(insert(START + 30, [9], "new"), tick(START + 45))
        await fleet.through(START + 45)
        fleet.stored()
        begun = fleet.begun
        await fleet.lose_owner()
        fleet.begun = begun
        writes = len(fleet.sink.writes)
        fleet.take_over()
        fleet.append(tick(START + 55))
        await fleet.through(START + 55)
        assert len(fleet.sink.writes) == writes, "read again for the keys alone"
        await fleet.late(ROWS)
        fleet.append(tick(START + 60))
        await mended(fleet, {1: ["old"], 2: ["old"], 3: ["old"], 9: ["new"]})


async def test_rows_do_not_wait_for_what_is_read_again_to_recount_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with taken_over(ROWS) as fleet:
        fleet.append(insert(START + 30, [9], "new"), tick(START + 45))
        await fleet.through(START + 45)
        fleet.stored()
        begun = fleet.begun
        await fleet.lose_owner()
        fleet.begun = begun
        opened, asked, may_read = fleet.source.open, asyncio.Event(), asyncio.Event()

        async def slowly(pchannel: str, position: bytes, incarnation: bytes = b"") -> LogReader:
            if position == begun.read_from:
                asked.set()
                await may_read.wait()
            return await opened(pchannel, position, incarnation)

        monkeypatch.setattr(fleet.source, "open", slowly)
        fleet.take_over()
        fleet.grant(START + 999)
        fleet.append(delete(START + 48, [1]), tick(START + 60))
        await asked.wait()
        fleet.append(delete(START + 70, [9]), insert(START + 71, [2, 4], "again"), tick(START + 80))
        await fleet.through(START + 80)
        assert fleet.texts() == {2: ["old", "again"], 3: ["old"], 4: ["again"]}
        await asyncio.sleep(0.5)
        assert fleet.runner.report().recounted is Recounted.NOT_YET
        may_read.set()
        assert await fleet.ended() is Recounted.DONE
        assert fleet.runner.report().lanes[0].resolved_ts == START + 80


async def test_a_log_that_no_longer_reaches_back_to_a_recount_is_said() -> None:
    async with taken_over(ROWS) as fleet:
        fleet.append(insert(START + 30, [9], "new"), tick(START + 45))
        await fleet.through(START + 45)
        fleet.stored()
        begun = fleet.begun
        await fleet.lose_owner()
        fleet.begun = begun
        fleet.source.truncate(PCHANNEL, fleet.checkpoint.read_from)
        fleet.take_over()
        fleet.append(tick(START + 60))
        assert (await failure(fleet)).reason == "LOG_TRUNCATED"


async def test_what_is_not_loaded_is_written_once_more_instead() -> None:
    fleet = Fleet()
    fleet.loaded(False)
    await fleet.start()
    fleet.append(tick(START + 1), ROWS, tick(START + 20))
    await fleet.through(START + 20)
    await fleet.lose_owner()
    fleet.take_over()
    await fleet.through(START + 20)
    await fleet.late(ROWS)
    fleet.append(tick(START + 60))
    await mended(fleet, {1: ["old"], 2: ["old"], 3: ["old"]})
    await fleet.runner.stop()
    await fleet.connections.close()


async def test_more_keys_than_memory_are_written_once_more_instead() -> None:
    async with taken_over(insert(START + 5, list(range(900))), memory=200_000) as fleet:
        fleet.append(tick(START + 60))
        assert await fleet.ended() is Recounted.WRITE_AGAIN
        await fleet.runner.stop()
        fleet.take_over(Recount.WRITE_AGAIN)
        assert await fleet.ended() is Recounted.DONE
        assert fleet.count() == 900


async def test_a_sink_that_does_not_answer_is_asked_again_but_not_for_ever() -> None:
    async with taken_over(ROWS) as fleet:
        asked = []

        async def refuse() -> None:
            asked.append(1)
            if len(asked) != 4:
                raise RetryableError("SINK_UNAVAILABLE", "connection refused")

        fleet.sink.before_copies = refuse
        fleet.append(tick(START + 60))
        assert await fleet.ended() is Recounted.DONE
        assert len(asked) == 4
        await fleet.runner.stop()
        asked[:] = [1] * 4
        fleet.take_over()
        assert await fleet.ended() is Recounted.WRITE_AGAIN


async def test_still_wrong_after_that_is_told_with_the_way_out() -> None:
    async with taken_over(ROWS) as fleet:
        fleet.append(tick(START + 60))
        await fleet.late(insert(START + 5, [2], "old"))
        assert await fleet.ended() is Recounted.WRITE_AGAIN
        await fleet.runner.stop()
        leave = asyncio.Event()
        fleet.sink.before_copies = leave.wait  # type: ignore[assignment]
        fleet.take_over(Recount.WRITE_AGAIN)
        await fleet.through(START + 60)
        await fleet.late(insert(START + 5, [2], "old"))
        leave.set()
        report = await failure(fleet)
        assert report.reason == "DOUBLED_KEYS"
        assert "for example 2)" in report.message
        assert "task resync" in report.message


async def test_stopping_does_not_wait_for_the_count() -> None:
    async with taken_over(ROWS) as fleet:
        asked = asyncio.Event()

        async def hang() -> None:
            asked.set()
            await asyncio.Event().wait()

        fleet.sink.before_copies = hang
        fleet.append(tick(START + 60))
        await asked.wait()
        await asyncio.wait_for(fleet.runner.stop(), 5)
        assert fleet.runner.report().recounted is Recounted.NOT_YET


pytestmark = pytest.mark.timeout(60)
