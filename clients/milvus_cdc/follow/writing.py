"""What a follower hands out, written by a `milvus_cdc.sink.writer.Writer`.

Law: an item was written when `write` returns. Errors are the writer's own: after a RetryableError
or an UnknownOutcomeError the same item may be given again.
"""

from __future__ import annotations

from milvus_cdc.follow.follower import Follower
from milvus_cdc.follow.items import ChangeBatch, EventKind, Item, SchemaEvent
from milvus_cdc.sink.writer import Opening, SchemaChange, SchemaChangeKind, Writer

TIMEOUT_SECONDS = 30.0
_KINDS = {
    EventKind.COLLECTION_RENAMED: SchemaChangeKind.RENAME_COLLECTION,
    EventKind.COLLECTION_DROPPED: SchemaChangeKind.DROP_COLLECTION,
    EventKind.PARTITION_DROPPED: SchemaChangeKind.DROP_PARTITION,
}


class WriterFeed:
    """One follower's items into one writer, which the caller closes."""

    def __init__(
        self,
        follower: Follower,
        writer: Writer,
        *,
        epoch: int = 1,
        adopt: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """`epoch`: grows with every start where two programs could write at once (a writer that
        keeps checkpoints shuts the lower one out). `adopt`: what is there under a new collection's
        name is taken over instead of refused.
        """
        self._follower = follower
        self._writer = writer
        self._epoch = epoch
        self._adopt = adopt
        self._timeout_seconds = timeout_seconds

    async def write(self, item: Item) -> None:
        """Opens, writes, renames or drops what the item says; `item` is the follower's last one."""
        match item:
            case ChangeBatch():
                await self._writer.write(item.table, item.to_write(), self._timeout_seconds)
            case SchemaEvent(kind=EventKind.COLLECTION_FOUND):
                await self._open(item)
            case SchemaEvent():
                change = SchemaChange(
                    _KINDS[item.kind], item.table, item.partition, item.renamed_from, item.ts
                )
                await self._writer.apply(change, self._timeout_seconds)
                if item.kind is EventKind.COLLECTION_DROPPED:
                    await self._writer.release(item.table)

    async def _open(self, item: SchemaEvent) -> None:
        new = Opening.ADOPT if self._adopt else Opening.NEW
        opening = Opening.RESUME if item.resumed else new
        opened = await self._writer.open(item.table, opening, self._epoch)
        self._follower.begin_at(item.table, opened.checkpoints)
