"""Log messages as operations to be put in order, operations as changes to be handed out.

Law: columns pass as they are; keys are read when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from milvus_cdc.codec.columns import field_id, key_values, select_rows
from milvus_cdc.codec.messages import Delete, DropCollection, DropPartition, Insert, Keys, Message
from milvus_cdc.errors import BugError
from milvus_cdc.order.ops import Key, LogOp, Rank
from milvus_cdc.rows import ChangeOp, Changes


def op_of(
    message: Message, position: bytes, order: int, vchannel: str, key_field_id: int
) -> LogOp | None:
    """What a message says of rows of one collection; None when it says nothing of them.

    `vchannel` is whose log it is read for: a delete of Milvus 2.2 names none.
    """
    match message:
        case Insert():
            made = LogOp(
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
                load_keys=lambda: frozenset(as_list(row_keys(message, key_field_id))),
            )
        case Delete():
            delete = message if message.vchannel else replace(message, vchannel=vchannel)
            made = LogOp(
                rank=Rank.DELETE,
                ts=delete.ts,
                order=order,
                position=position,
                payload=delete,
                size=delete.size,
                rows=len(delete.keys),
                partition_id=delete.partition_id,
                partition=delete.partition_name,
                msg_id=delete.msg_id,
                load_keys=lambda: frozenset(as_list(delete.keys)),
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
    made.restrict = partial(_of_keys, made, key_field_id)
    return made


def part_of(op: LogOp, rows: Sequence[int], key_field_id: int) -> LogOp:
    """Some rows or keys of an operation that `op_of` made, by their indexes, as one of its own."""
    message: Insert | Delete = op.payload
    size = op.size * len(rows) // max(1, op.rows)
    part: Insert | Delete
    if isinstance(message, Delete):
        keys = message.keys
        chosen = tuple(keys[r] for r in rows) if isinstance(keys, tuple) else keys[list(rows)]
        part = replace(message, keys=chosen, size=size)
    else:
        columns = tuple(select_rows(column, rows) for column in message.columns)
        part = replace(message, columns=columns, num_rows=len(rows), size=size)
    made = replace(
        op,
        payload=part,
        size=size,
        rows=len(rows),
        load_keys=lambda: frozenset(as_list(keys_of(part, key_field_id))),
        batch=None,
        paired=[],
        _keys=None,
    )
    made.restrict = partial(_of_keys, made, key_field_id)
    return made


def _of_keys(op: LogOp, key_field_id: int, wanted: frozenset[Key]) -> LogOp:
    keys = as_list(keys_of(op.payload, key_field_id))
    return part_of(op, [row for row, key in enumerate(keys) if key in wanted], key_field_id)


def keys_of(message: Insert | Delete, key_field_id: int) -> Keys:
    """Of its rows, or the ones it deletes. Raises BugError KEY_COLUMN_MISSING."""
    return message.keys if isinstance(message, Delete) else row_keys(message, key_field_id)


def changes_of(op: LogOp) -> Changes:
    """Of an operation that `op_of` made of rows or keys.

    Its partition is the operation's: messages name a physical one also where a partition key
    places the rows, and there a key's next row may come with another.
    """
    message = op.payload
    if isinstance(message, Delete):
        kind = ChangeOp.DELETE
    else:
        kind = ChangeOp.UPDATE if op.replaces else ChangeOp.CREATE
    return Changes(
        kind,
        op.ts,
        message.vchannel,
        op.order,
        op.partition,
        op.rows,
        columns=() if isinstance(message, Delete) else message.columns,
        delete_keys=message.keys if isinstance(message, Delete) else None,
        size=op.size,
        traceparent=message.traceparent,
    )


def row_keys(message: Insert, key_field_id: int) -> Keys:
    """Primary keys of its rows. Raises BugError KEY_COLUMN_MISSING."""
    for column in message.columns:
        if field_id(column) == key_field_id:
            return key_values(column)
    raise BugError(
        "KEY_COLUMN_MISSING",
        f"an insert of collection {message.collection_id} has no column for the primary key "
        f"(field id {key_field_id})",
    )


def as_list(keys: Keys) -> list[Key]:
    return list(keys) if isinstance(keys, tuple) else keys.tolist()
