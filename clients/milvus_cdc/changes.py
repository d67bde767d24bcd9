"""Log messages as operations to be put in order, operations as changes to be handed out.

Law: columns pass as they are; keys are read when somebody asks for them.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.codec.columns import field_id, key_values
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
                load_keys=lambda: frozenset(as_list(row_keys(message, key_field_id))),
            )
        case Delete():
            delete = message if message.vchannel else replace(message, vchannel=vchannel)
            return LogOp(
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
