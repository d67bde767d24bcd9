"""Entries of a thread that reads ahead: each comes once, in order, and not too many at a time."""

from __future__ import annotations

import asyncio
import queue
import threading

import pytest
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.source import LogEntry
from milvus_cdc.source.read_ahead import ReadAhead

Fetched = list[LogEntry] | Exception


class Fetching:
    """What a test puts in comes out of `fetch`, an error by being raised."""

    def __init__(self) -> None:
        self.coming: queue.Queue[Fetched] = queue.Queue()
        self.fetched = 0
        self.ended = threading.Event()
        self.ahead = ReadAhead("test", self._fetch, self.ended.set)

    def put(self, *numbers: int) -> None:
        self.coming.put([entry(n) for n in numbers])

    def _fetch(self) -> list[LogEntry]:
        try:
            found = self.coming.get(timeout=0.01)
        except queue.Empty:
            return []
        self.fetched += 1
        if isinstance(found, Exception):
            raise found
        return found

    async def read(self, count: int, max_bytes: int = 1000) -> list[int]:
        got: list[LogEntry] = []
        async with asyncio.timeout(10):
            while len(got) < count:
                got += await self.ahead.read(max_bytes, 1.0)
        return [int(each.payload) for each in got]


def entry(number: int) -> LogEntry:
    return LogEntry(b"", b"%10d" % number)


async def test_a_cancelled_read_loses_nothing() -> None:
    fetching = Fetching()
    for n in range(20):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001 * n):
                await fetching.ahead.read(1000, 10.0)
        fetching.put(n)
        assert await fetching.read(1) == [n]
    await fetching.ahead.close()
    assert fetching.ended.is_set()


async def test_an_error_comes_behind_the_entries_before_it() -> None:
    fetching = Fetching()
    fetching.put(1, 2)
    fetching.coming.put(RetryableError("QUEUE_UNREACHABLE", "for now"))
    fetching.put(3)
    assert await fetching.read(2) == [1, 2]
    with pytest.raises(RetryableError):
        await fetching.read(1)
    assert await fetching.read(1) == [3]
    fetching.coming.put(UserError("QUEUE_ACCESS_DENIED", "for ever"))
    fetching.put(4)
    for _ in range(2):
        with pytest.raises(UserError):
            await fetching.read(1)
    assert fetching.fetched == 4, "nothing is fetched after that"
    await fetching.ahead.close()


async def test_it_stays_ahead_by_half_of_what_is_asked_for() -> None:
    fetching = Fetching()
    for n in range(50):
        fetching.put(n)
    got = await fetching.read(1, 100)
    # Six of ten bytes are more than half of a hundred.
    async with asyncio.timeout(10):
        while fetching.fetched < len(got) + 6:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert fetching.fetched == len(got) + 6
    got += await fetching.read(50 - len(got), 100)
    assert got == list(range(50))
    await fetching.ahead.close()
