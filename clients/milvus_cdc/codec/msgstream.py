"""Decodes log entries of the msgstream format (Milvus 2.2 to 2.5), leaving columns untouched.

Laws: an entry either becomes the message it is or raises; nothing decodes as something weaker. Row
times come from `timestamps[]`: the insert half of an upsert carries a base timestamp of 0 (seen on
2.3.5). Field numbers are those of milvus-proto `msg.proto`, v2.2.16 to v2.5.27.
"""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError
from milvuscdc.internal import milvus_log_pb2 as log_pb2

from milvus_cdc.codec.messages import (
    CreateCollection,
    Delete,
    DropCollection,
    DropPartition,
    Insert,
    Keys,
    Message,
    Other,
    Tick,
)
from milvus_cdc.errors import BugError, UserError
from milvus_cdc.milvus_protos import common_pb2, msg_pb2
from milvus_cdc.source import LogEntry

_INSERT = 400
_DELETE = 401
_TICK = 1200
_CREATE_COLLECTION = 100
_DROP_COLLECTION = 101
_DROP_PARTITION = 201

_COLUMN_BASED = 1

NO_ROW_TYPES = frozenset(
    common_pb2.MsgType.Value(name)
    for name in (
        # On the DML topics of 2.5: marks the end of a mirrored collection or database.
        "Replicate",
        # On the operations topic `{cluster}-replicate-msg` (2.3.2 to 2.5, milvus
        # `internal/proxy/util.go`, `SendReplicateMessagePack`).
        "CreateIndex",
        "DropIndex",
        "AlterIndex",
        "Flush",
        "LoadCollection",
        "ReleaseCollection",
        "LoadPartitions",
        "ReleasePartitions",
        "CreateDatabase",
        "DropDatabase",
        "AlterDatabase",
        "AlterCollection",
        "AlterCollectionField",
        "RenameCollection",
        "CreateAlias",
        "DropAlias",
        "AlterAlias",
        "CreateCredential",
        "UpdateCredential",
        "DeleteCredential",
        "CreateRole",
        "DropRole",
        "OperateUserRole",
        "OperatePrivilege",
        "OperatePrivilegeV2",
        "CreatePrivilegeGroup",
        "DropPrivilegeGroup",
        "OperatePrivilegeGroup",
    )
)
"""Types that change no rows of a collection and become `Other`; all others unknown here raise."""

_HEX_PREFIX_BYTES = 48


def decode(entry: LogEntry) -> Message:
    """The message of one log entry.

    Raises UserError STREAMING_FORMAT, BugError UNDECODABLE_MESSAGE, ROW_BASED_INSERT or
    PREDICATE_DELETE. The caller knows topic and position and adds them.
    """
    if entry.streaming:
        raise UserError(
            "STREAMING_FORMAT",
            "the source writes the streaming format of Milvus 2.6 and later; this version of "
            "milvus-cdc reads sources of Milvus 2.2 to 2.5: use one that reads the source's",
        )
    payload = entry.payload
    try:
        base = _base(payload)
        kind = base.msg_type
        if kind == _TICK:
            return Tick(_time(base.timestamp))
        if kind == _INSERT:
            return _insert(payload, entry.traceparent)
        if kind == _DELETE:
            return _delete(payload, entry.traceparent)
        if kind == _CREATE_COLLECTION:
            created = msg_pb2.CreateCollectionRequest.FromString(payload)
            return CreateCollection(_id(created.collectionID), _time(created.base.timestamp))
        if kind == _DROP_COLLECTION:
            dropped = msg_pb2.DropCollectionRequest.FromString(payload)
            return DropCollection(_id(dropped.collectionID), _time(dropped.base.timestamp))
        if kind == _DROP_PARTITION:
            part = msg_pb2.DropPartitionRequest.FromString(payload)
            return DropPartition(
                _id(part.collectionID),
                _id(part.partitionID),
                part.partition_name,
                _time(part.base.timestamp),
            )
        if kind in NO_ROW_TYPES:
            return Other(kind, base.timestamp)
        raise _Malformed(f"message type {kind} ({_type_name(kind)}) is not one that a log holds")
    except (DecodeError, _Malformed) as error:
        start = payload[:_HEX_PREFIX_BYTES].hex() or "(none)"
        raise BugError(
            "UNDECODABLE_MESSAGE", f"{error}; {len(payload)} bytes beginning {start}"
        ) from error


class _Malformed(Exception):
    """It parses, but not as anything Milvus writes."""


def _base(payload: bytes) -> log_pb2.LogBase:
    # Every writer puts field 1 first, and the base is short: parsing only its slice spares copying
    # the columns as unknown fields. Any other layout takes the slow and complete way.
    if len(payload) > 2 and payload[0] == 0x0A and (size := payload[1]) < 0x80:
        if size + 2 > len(payload):
            raise _Malformed("the message is cut off inside its base")
        return log_pb2.LogBase.FromString(payload[2 : 2 + size])
    return log_pb2.LogHeader.FromString(payload).base


def _insert(payload: bytes, traceparent: str) -> Insert:
    message = log_pb2.LogInsert.FromString(payload)
    base = message.base
    if base.msg_type != _INSERT:
        raise _Malformed("the base occurs twice with different types")
    if message.version != _COLUMN_BASED or message.row_data:
        raise BugError(
            "ROW_BASED_INSERT",
            "an insert in the row-based format, which only clusters older than Milvus 2.2 write, "
            "is not supported: upgrade the source and start the task at `latest`",
        )
    num_rows = message.num_rows
    timestamps = message.timestamps
    if not num_rows or len(timestamps) != num_rows:
        raise _Malformed(f"an insert of {num_rows} rows with {len(timestamps)} timestamps")
    columns = tuple(message.fields_data)
    if not columns or not all(columns):
        raise _Malformed("an insert with no columns or an empty one")
    return Insert(
        vchannel=_named(message.shard_name),
        collection_id=_id(message.collection_id),
        partition_id=message.partition_id,
        partition_name=message.partition_name,
        ts=_time(max(timestamps)),
        num_rows=num_rows,
        columns=columns,
        msg_id=base.msg_id,
        size=len(payload),
        traceparent=traceparent,
    )


def _delete(payload: bytes, traceparent: str) -> Delete:
    message = log_pb2.LogDelete.FromString(payload)
    base = message.base
    if base.msg_type != _DELETE:
        raise _Malformed("the base occurs twice with different types")
    if message.serialized_expr_plan:
        raise BugError(
            "PREDICATE_DELETE",
            "a delete by predicate (Milvus 3.0) is not supported: its keys are not in the log",
        )
    keys = _keys(message)
    num_rows = message.num_rows
    timestamps = message.timestamps
    if num_rows <= 0 or len(timestamps) != num_rows or len(keys) != num_rows:
        raise _Malformed(
            f"a delete of {num_rows} rows with {len(timestamps)} timestamps and {len(keys)} keys"
        )
    return Delete(
        vchannel=message.shard_name,
        collection_id=_id(message.collection_id),
        partition_id=message.partition_id,
        partition_name=message.partition_name,
        ts=_time(max(timestamps)),
        keys=keys,
        msg_id=base.msg_id,
        size=len(payload),
        traceparent=traceparent,
    )


def _keys(message: log_pb2.LogDelete) -> Keys:
    legacy = message.int64_primary_keys
    match message.primary_keys.WhichOneof("id_field"):
        case "int_id":
            data = message.primary_keys.int_id.data
            return np.fromiter(data, np.int64, len(data))
        case "str_id":
            return tuple(message.primary_keys.str_id.data)
        case _:
            return np.fromiter(legacy, np.int64, len(legacy))


def _time(ts: int) -> int:
    if not ts:
        raise _Malformed("the message has no timestamp")
    return ts


def _id(collection_or_partition: int) -> int:
    if collection_or_partition <= 0:
        raise _Malformed("the message names no collection or partition")
    return collection_or_partition


def _named(vchannel: str) -> str:
    if not vchannel:
        raise _Malformed("the message names no vchannel")
    return vchannel


def _type_name(kind: int) -> str:
    return common_pb2.MsgType.Name(kind) if kind in common_pb2.MsgType.values() else "unknown"
