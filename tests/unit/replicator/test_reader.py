"""One read of a pchannel for many: interruptions end for everybody, and nobody stops unsaid."""

from __future__ import annotations

import asyncio

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.milvus_protos import common_pb2
from milvus_cdc.source.memory import MemoryReader, MemorySource
from milvus_cdc_replicator.reader import NEAR_ENTRIES, Item, PchannelHub, Subscription
from milvuscdc.internal import milvus_log_pb2 as log_pb2

from tests.unit.replicator.test_runner import PCHANNEL, tick, until


class Follower:
    """A subscriber that always has room."""

    def __init__(self, hub: PchannelHub, start: int) -> None:
        self.orders: list[int] = []
        self.news: list[CdcError | None] = []
        hub.subscribe(
            Subscription(
                PCHANNEL,
                f"{PCHANNEL}_7v0",
                7,
                start.to_bytes(8, "little"),
                start - 1,
                self._take,
                lambda: True,
                self.news.append,
            )
        )

    def _take(self, _vchannel: str, items: list[Item]) -> None:
        self.orders += [item.order for item in items]


async def test_who_changes_over_to_a_reading_that_works_is_told_so() -> None:
    end = NEAR_ENTRIES + 100

    class HalfDown(MemorySource):
        async def open(
            self, pchannel: str, position: bytes, incarnation: bytes = b""
        ) -> MemoryReader:
            if self.order(position):
                raise RetryableError("QUEUE_UNREACHABLE", "not from here")
            return await super().open(pchannel, position, incarnation)

    source = HalfDown()
    source.create(PCHANNEL)
    hub = PchannelHub(source, PCHANNEL)
    late = Follower(hub, end)
    await until(lambda: late.news != [])
    for n in range(end + 1):
        source.append(PCHANNEL, tick(n + 1))
    early = Follower(hub, 0)
    await until(lambda: late.orders != [])
    assert late.orders == [end]
    assert early.orders == list(range(end + 1))
    assert late.news[-1] is None, "it is read again, and shown so"
    await hub.close()


async def test_a_reading_that_a_client_cancels_begins_anew_and_says_so() -> None:
    """A library's own cancellation must not end a reading for good, unseen."""
    cancellations = [1, 1]

    class Cancelled(MemoryReader):
        async def read(self, max_bytes: int, wait_seconds: float) -> list:  # type: ignore[type-arg]
            if cancellations:
                cancellations.pop()
                raise asyncio.CancelledError
            return await super().read(max_bytes, wait_seconds)

    class Source(MemorySource):
        async def open(
            self, pchannel: str, position: bytes, incarnation: bytes = b""
        ) -> MemoryReader:
            reader = await super().open(pchannel, position, incarnation)
            return Cancelled(self, pchannel, reader.incarnation, self.order(position))

    source = Source()
    hub = PchannelHub(source, PCHANNEL)
    for n in range(3):
        source.append(PCHANNEL, tick(n + 1))
    follower = Follower(hub, 0)

    def arrived() -> bool:
        hub.wake()
        return bool(follower.orders)

    await until(arrived)
    assert follower.orders == [0, 1, 2]
    assert isinstance(follower.news[0], RetryableError)
    assert follower.news[-1] is None
    await hub.close()


async def test_who_stands_where_the_log_goes_on_does_not_fail_with_who_stands_before() -> None:
    source = MemorySource()
    for n in range(6):
        source.append(PCHANNEL, tick(n + 1))
    source.truncate(PCHANNEL, (4).to_bytes(8, "little"))
    hub = PchannelHub(source, PCHANNEL)
    followers = [Follower(hub, start) for start in (1, 4, 2, 5)]
    await until(lambda: all(each.news or each.orders for each in followers))
    before, first, second, last = followers
    for truncated in (before, second):
        assert [getattr(each, "reason", None) for each in truncated.news] == ["LOG_TRUNCATED"]
        assert not truncated.orders
    for sound in (first, last):
        assert sound.news == []
    assert (first.orders, last.orders) == ([4, 5], [5])
    await hub.close()


def delete_without_shard(ts: int) -> bytes:
    """As Milvus 2.2 writes it."""
    return log_pb2.LogDelete(
        base=log_pb2.LogBase(msg_type=common_pb2.Delete, timestamp=ts),
        collection_id=7,
        partition_id=-1,
        int64_primary_keys=[1],
        num_rows=1,
        timestamps=[ts],
    ).SerializeToString()


async def test_a_delete_of_2_2_concerns_its_collections_only_shard_on_the_topic() -> None:
    source = MemorySource()
    hub = PchannelHub(source, PCHANNEL)
    source.append(PCHANNEL, delete_without_shard(5))
    follower = Follower(hub, 0)
    await until(lambda: follower.orders == [0])
    await hub.close()
