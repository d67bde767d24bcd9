"""Log messages to operations of the core, operations to batches of the sink; columns pass as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from milvus_cdc.changes import as_list, changes_of, op_of, row_keys
from milvus_cdc.codec.messages import Keys, Message
from milvus_cdc.order.ops import Key, LogOp
from milvus_cdc.sink import AnyBatch, DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.sink.writer import Batch, Checkpoint

from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.refusing import Refusing


class Converter:
    """Knows which column holds the primary key of one collection."""

    def __init__(self, key_field_id: int) -> None:
        self._key_field_id = key_field_id
        self.refusing = Refusing(key_field_id)

    def op(self, message: Message, position: bytes, order: int, vchannel: str) -> LogOp | None:
        """None for a message that asks nothing of the sink."""
        return op_of(message, position, order, vchannel, self._key_field_id)

    def batch(self, write: Write, *, as_upsert: bool) -> AnyBatch:
        """The request for one write; `as_upsert` after an attempt whose outcome is unknown."""
        if write.kind is WriteKind.CHANGES:
            marks = write.marks.values()
            return Batch(
                tuple(changes_of(op) for op in write.ops),
                tuple(Checkpoint(m.vchannel, m.read_from, m.resolved_ts) for m in marks),
            )
        if write.kind is WriteKind.DELETE:
            return DeleteBatch(write.partition, _join_keys(op.payload.keys for op in write.ops))
        if write.kind is WriteKind.INSERT and not as_upsert:
            chunks = tuple(RowChunk(op.payload.columns, op.rows) for op in write.ops)
            return RowBatch(Op.INSERT, write.partition, chunks)
        return RowBatch(Op.UPSERT, write.partition, self._unique_chunks(write))

    def _unique_chunks(self, write: Write) -> tuple[RowChunk, ...]:
        """A key once per request, the last wins: Milvus stores a key twice that one Upsert names
        twice.
        """
        if len(write.keys()) == write.rows:
            return tuple(RowChunk(op.payload.columns, op.rows) for op in write.ops)
        seen: set[Key] = set()
        chunks: list[RowChunk] = []
        for op in reversed(write.ops):
            keys = as_list(row_keys(op.payload, self._key_field_id))
            keep: list[int] = []
            for row in range(len(keys) - 1, -1, -1):
                if keys[row] not in seen:
                    seen.add(keys[row])
                    keep.append(row)
            keep.reverse()
            if keep:
                whole = len(keep) == op.rows
                chunks.append(RowChunk(op.payload.columns, op.rows, None if whole else tuple(keep)))
        chunks.reverse()
        return tuple(chunks)


def _join_keys(parts: Iterable[Keys]) -> Keys:
    whole = list(parts)
    first = whole[0]
    if isinstance(first, tuple):
        return tuple(key for part in whole for key in part)
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in whole])
