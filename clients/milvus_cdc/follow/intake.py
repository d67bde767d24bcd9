"""The reading side of a follower: which shard has something, room, and the ends of logs.

Laws: what is read and not yet handed out has a bound: reading waits for the program, and what waits
for its tick beyond the bound is forgotten, and read again in portions. Whatever waits for another
shard never keeps that one from being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.follow.followed import BatchLimits, Followed
from milvus_cdc.follow.items import Item
from milvus_cdc.follow.reading import PchannelReading, Shard
from milvus_cdc.order.lane import Lane
from milvus_cdc.source import LogSource

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""Between looks at the ends of the logs of dropped collections."""
LOG_END_QUIET_SECONDS = 2.0
READ_BYTES = 2 * 1024 * 1024
"""At once, per pchannel."""
LEAST_PORTION_BYTES = 64 * 1024

_Key = tuple[int, str]
"""Collection id and vchannel."""


class Intake:
    """`on_news` is called when `next_item` may have something; the rest as of PchannelReading."""

    def __init__(
        self,
        source: LogSource,
        memory_bytes: int,
        *,
        on_news: Callable[[], None],
        on_trouble: Callable[[str, RetryableError | None], None],
        on_failure: Callable[[CdcError], None],
    ) -> None:
        self._source = source
        self._half_bytes = memory_bytes // 2
        """One half is for what may be handed out, one for what waits for its tick."""
        self._on_news = on_news
        self._on_trouble = on_trouble
        self._on_failure = on_failure
        self._followed: dict[int, Followed] = {}
        self._readings: dict[str, PchannelReading] = {}
        self._shards: dict[_Key, Shard] = {}
        self._ready: dict[_Key, None] = {}
        """Vchannels with something staged, the one served longest ago first."""
        self._ending: set[int] = set()
        """Collections with a shard whose log has ended."""
        self._held_bytes = 0
        """In the hands of the program."""
        self._starving = False

    def begin(self, followed: Followed) -> None:
        """Reads it from now on."""
        followed.begun = True
        self._followed[followed.collection_id] = followed
        for vchannel, lane in followed.lanes.items():
            if lane.ended:
                self._ending.add(followed.collection_id)
                continue
            shard = Shard(
                lane,
                followed.collection_id,
                followed.table.key.field_id,
                lane.read_from,
                self._source.order(lane.read_from) - 1,
                followed.incarnations[vchannel],
            )
            self._shards[followed.collection_id, vchannel] = shard
            self._reading(lane.pchannel).add(shard)

    def forget(self, collection_id: int) -> None:
        """Reads it no more."""
        self._followed.pop(collection_id, None)
        self._ending.discard(collection_id)
        for reading in self._readings.values():
            reading.remove(collection_id)
        for key in [key for key in self._shards if key[0] == collection_id]:
            del self._shards[key]
            self._ready.pop(key, None)

    def next_item(self, limits: BatchLimits) -> Item | None:
        for collection_id in self._ending:
            if (ended := self._followed[collection_id].ended()) is not None:
                return ended
        for key in list(self._ready):
            collection_id, vchannel = key
            followed = self._followed[collection_id]
            item = followed.next_item(vchannel, limits)
            if not followed.lanes[vchannel].staged:
                del self._ready[key]
            elif item is not None:
                self._ready[key] = self._ready.pop(key)
            if item is not None:
                return item
        return None

    def note_incarnations(self, followed: Followed) -> None:
        """What reading has found out of its topics."""
        for vchannel in followed.lanes:
            shard = self._shards.get((followed.collection_id, vchannel))
            if shard is not None:
                followed.incarnations[vchannel] = shard.incarnation

    def hold(self, held_bytes: int) -> None:
        """What the program has in hand."""
        self._held_bytes = held_bytes
        self._wake()

    def starve(self, starving: bool) -> None:
        """The program waits, and there is nothing for it."""
        self._starving = starving
        self._wake()

    async def close(self) -> None:
        await asyncio.gather(*(reading.close() for reading in self._readings.values()))

    async def look_for_log_ends(self) -> None:
        """Of dropped collections: ticks may stop with the last collection of a pchannel, then the
        end of its log is the end. Runs until it is cancelled.
        """
        quiet: dict[_Key, tuple[int, float]] = {}
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for key, shard in list(self._shards.items()):
                if not self._followed[key[0]].vanished or shard.lane.ended:
                    continue
                try:
                    end = (await self._source.log_range(shard.lane.pchannel)).end
                except CdcError:
                    continue  # the reader meets the same trouble and tells it
                now, read = asyncio.get_running_loop().time(), shard.last_order
                if read + 1 < self._source.order(end) or key not in self._shards:
                    continue
                before, since = quiet.get(key, (-1, now))
                quiet[key] = (read, since if read == before else now)
                if read == before and now - since >= LOG_END_QUIET_SECONDS:
                    shard.lane.end_of_log()
                    self._on_read(self._readings[shard.lane.pchannel])

    def _reading(self, pchannel: str) -> PchannelReading:
        reading = self._readings.get(pchannel)
        if reading is None:
            reading = self._readings[pchannel] = PchannelReading(
                self._source,
                pchannel,
                read_bytes=min(READ_BYTES, self._half_bytes // 4),
                may_read=self._may_read,
                on_read=self._on_read,
                on_trouble=self._on_trouble,
                on_failure=self._on_failure,
            )
        return reading

    def _may_read(self, reading: PchannelReading) -> bool:
        """With its half full and nothing to hand out, everything waits for a drop to be reached by
        the shard that is furthest behind.
        """
        staged = sum([self._shards[key].lane.staged_bytes for key in self._ready])
        if staged + self._held_bytes < self._half_bytes:
            return True
        if not self._starving:
            return False
        ends = [ts for each in self._readings.values() if (ts := each.released_ts) is not None]
        return reading.released_ts == min(ends, default=None)

    def _on_read(self, reading: PchannelReading) -> None:
        for shard in reading.shards:
            if shard.lane.staged:
                self._ready.setdefault((shard.collection_id, shard.lane.vchannel))
            if shard.lane.ended:
                self._ending.add(shard.collection_id)
        self._starving = False  # until it has looked
        self._relieve()
        self._on_news()

    def _relieve(self) -> None:
        while sum([each.buffered_bytes for each in self._readings.values()]) > self._half_bytes:
            lanes = [shard.lane for shard in self._shards.values() if shard.lane.may_forget]
            lane: Lane | None = max(lanes, key=lambda each: each.buffered_bytes, default=None)
            if lane is None:
                return
            share = self._half_bytes // (2 * len(self._shards))
            lane.forget(max(share, LEAST_PORTION_BYTES))
            log.info("forgotten until its tick is known", vchannel=lane.vchannel)
            self._readings[lane.pchannel].account()

    def _wake(self) -> None:
        for reading in self._readings.values():
            reading.wake()
