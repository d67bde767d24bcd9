"""Log messages to operations of the core, operations to batches of the sink; columns pass as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from milvus_cdc.codec.columns import field_id, key_values
from milvus_cdc.codec.messages import Delete, DropCollection, DropPartition, Insert, Keys, Message
from milvus_cdc.errors import BugError
from milvus_cdc.order.ops import Key, LogOp, Rank
from milvus_cdc.rows import ChangeOp, Changes
from milvus_cdc.sink import AnyBatch, DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.sink.writer import Batch, Checkpoint

from milvus_cdc_replicator.core.ops import Write, WriteKind


class Converter:
    """Knows which column holds the primary key of one collection."""

    def __init__(self, key_field_id: int) -> None:
        self._key_field_id = key_field_id

    def op(self, message: Message, position: bytes, order: int) -> LogOp | None:
        """None for a message that asks nothing of the sink."""
        match message:
            case Insert():
                return LogOp(
                    rank=Rank.INSERT,
                    ts=message.ts,
                    order=order,
                    position=position,
                    payload=message,
                    size=message.size,
                    rows=message.num_rows,
                    partition_id=message.partition_id,
                    partition=message.partition_name,
                    msg_id=message.msg_id,
                    load_keys=lambda: frozenset(_as_list(self._row_keys(message))),
                )
            case Delete():
                return LogOp(
                    rank=Rank.DELETE,
                    ts=message.ts,
                    order=order,
                    position=position,
                    payload=message,
                    size=message.size,
                    rows=len(message.keys),
                    partition_id=message.partition_id,
                    partition=message.partition_name,
                    msg_id=message.msg_id,
                    load_keys=lambda: frozenset(_as_list(message.keys)),
                )
            case DropPartition():
                return LogOp(
                    rank=Rank.MARKER,
                    ts=message.ts,
                    order=order,
                    position=position,
                    payload=message,
                    partition_id=message.partition_id,
                    partition=message.partition_name,
                )
            case DropCollection():
                return LogOp(
                    rank=Rank.MARKER,
                    ts=message.ts,
                    order=order,
                    position=position,
                    payload=message,
                    drops_collection=True,
                )
            case _:
                return None

    def batch(self, write: Write, *, as_upsert: bool) -> AnyBatch:
        """The request for one write; `as_upsert` after an attempt whose outcome is unknown."""
        if write.kind is WriteKind.CHANGES:
            marks = write.marks.values()
            return Batch(
                tuple(_changes(op) for op in write.ops),
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
            keys = _as_list(self._row_keys(op.payload))
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

    def _row_keys(self, message: Insert) -> Keys:
        for column in message.columns:
            if field_id(column) == self._key_field_id:
                return key_values(column)
        raise BugError(
            "KEY_COLUMN_MISSING",
            f"an insert of collection {message.collection_id} has no column for the primary key "
            f"(field id {self._key_field_id})",
        )


def _changes(op: LogOp) -> Changes:
    message = op.payload
    if isinstance(message, Delete):
        return Changes(
            ChangeOp.DELETE,
            op.ts,
            message.vchannel,
            op.order,
            message.partition_name,
            op.rows,
            delete_keys=message.keys,
            size=op.size,
        )
    return Changes(
        ChangeOp.UPDATE if op.replaces else ChangeOp.CREATE,
        op.ts,
        message.vchannel,
        op.order,
        message.partition_name,
        op.rows,
        columns=message.columns,
        size=op.size,
    )


def _as_list(keys: Keys) -> list[Key]:
    return list(keys) if isinstance(keys, tuple) else keys.tolist()


def _join_keys(parts: Iterable[Keys]) -> Keys:
    whole = list(parts)
    first = whole[0]
    if isinstance(first, tuple):
        return tuple(key for part in whole for key in part)
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in whole])
