"""Decodes the operations channel `{cluster}-replicate-msg`: what users asked a source to do.

Facts: every entry is the whole `milvus.*Request`, told by `base.msg_type` (seen on 2.3.5: indexes,
flush, load, databases; users and roles from 2.4 on, milvus `internal/proxy/util.go`,
SendReplicateMessagePack, unproved on a server). The channel has no ticks; `base.timestamp` is the
order. Law: nothing here is an error: what is not known is `UnknownOperation`, because the source's
metadata has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.sink.metadata import CredentialAction, CredentialChange

_FLUSH = common_pb2.MsgType.Value("Flush")
_CREATE_USER = common_pb2.MsgType.Value("CreateCredential")
_UPDATE_USER = common_pb2.MsgType.Value("UpdateCredential")
_DELETE_USER = common_pb2.MsgType.Value("DeleteCredential")


@dataclass(frozen=True, slots=True)
class FlushOperation:
    """Names as at the source."""

    ts: int
    database: str
    collections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CredentialOperation:
    ts: int
    change: CredentialChange = field(repr=False)


@dataclass(frozen=True, slots=True)
class UnknownOperation:
    """Carried by other means, or not readable: `kind` is a message type, or UNREADABLE."""

    kind: str


Operation = FlushOperation | CredentialOperation | UnknownOperation


def decode_operation(payload: bytes) -> Operation:
    try:
        base = common_pb2.MsgHeader.FromString(payload).base
        return _decode(base.msg_type, base.timestamp, payload)
    except DecodeError:
        return UnknownOperation("UNREADABLE")


def _decode(kind: int, ts: int, payload: bytes) -> Operation:
    if kind == _FLUSH:
        flush = milvus_pb2.FlushRequest.FromString(payload)
        return FlushOperation(ts, flush.db_name, tuple(flush.collection_names))
    if kind == _CREATE_USER:
        made = milvus_pb2.CreateCredentialRequest.FromString(payload)
        change = CredentialChange(CredentialAction.CREATE, made.username, made.password)
        return CredentialOperation(ts, change)
    if kind == _UPDATE_USER:
        new = milvus_pb2.UpdateCredentialRequest.FromString(payload)
        change = CredentialChange(
            CredentialAction.UPDATE, new.username, new.newPassword, new.oldPassword
        )
        return CredentialOperation(ts, change)
    if kind == _DELETE_USER:
        gone = milvus_pb2.DeleteCredentialRequest.FromString(payload)
        return CredentialOperation(ts, CredentialChange(CredentialAction.DELETE, gone.username))
    known = kind in common_pb2.MsgType.values()
    return UnknownOperation(common_pb2.MsgType.Name(kind) if known else str(kind))
