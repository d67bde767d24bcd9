"""The operations channel of a real 2.3.5, and what later versions document."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.codec.operations import (
    CredentialOperation,
    FlushOperation,
    UnknownOperation,
    decode_operation,
)
from milvus_cdc.sink.metadata import CredentialAction, CredentialChange
from pymilvus.grpc_gen import common_pb2, milvus_pb2

_LOG = Path(__file__).parents[2] / "vectors" / "golden_msgstream_kafka_2.3.5.json"
RECORDS = [
    base64.b64decode(record["value_b64"])
    for record in json.loads(_LOG.read_text())
    if record["topic"] == "by-dev-replicate-msg"
]


def test_a_real_channel() -> None:
    index, flush, *others = map(decode_operation, RECORDS)
    assert index == UnknownOperation("CreateIndex")
    assert isinstance(flush, FlushOperation)
    assert (flush.database, flush.collections) == ("default", ("c1",))
    assert flush.ts > 0
    assert [each.kind for each in others if isinstance(each, UnknownOperation)] == [
        "LoadCollection",
        "ReleaseCollection",
        "CreateDatabase",
        "DropDatabase",
    ]


def credential(kind: str, request: Any) -> CredentialChange:
    request.base.msg_type = common_pb2.MsgType.Value(kind)
    request.base.timestamp = 9
    operation = decode_operation(request.SerializeToString())
    assert isinstance(operation, CredentialOperation)
    assert operation.ts == 9
    assert "b25l" not in repr(operation)
    return operation.change


def test_users_as_later_versions_write_them() -> None:
    made = milvus_pb2.CreateCredentialRequest(username="ann", password="b25l")
    assert credential("CreateCredential", made) == CredentialChange(
        CredentialAction.CREATE, "ann", "b25l"
    )
    new = milvus_pb2.UpdateCredentialRequest(username="ann", oldPassword="b25l", newPassword="dHdv")
    assert credential("UpdateCredential", new) == CredentialChange(
        CredentialAction.UPDATE, "ann", "dHdv", "b25l"
    )
    gone = milvus_pb2.DeleteCredentialRequest(username="ann")
    assert credential("DeleteCredential", gone) == CredentialChange(CredentialAction.DELETE, "ann")


@given(st.binary(max_size=64))
def test_nothing_is_an_error(payload: bytes) -> None:
    decode_operation(payload)
