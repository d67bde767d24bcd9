"""Entries written by a real Milvus 2.3.5, and everything that must not pass as a message."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.codec.columns import field_id, key_values
from milvus_cdc.codec.messages import (
    CreateCollection,
    Delete,
    DropCollection,
    DropPartition,
    Insert,
    Message,
    Other,
    Tick,
)
from milvus_cdc.codec.msgstream import NO_ROW_TYPES, decode
from milvus_cdc.errors import BugError, CdcError, UserError
from milvus_cdc.source import LogEntry
from pymilvus.grpc_gen import common_pb2, msg_pb2, schema_pb2

VECTORS = Path(__file__).parents[2] / "vectors" / "golden_msgstream_kafka_2.3.5.json"
C1 = 470605299854082291
C10 = 470605299854486172


def entry(payload: bytes) -> LogEntry:
    return LogEntry(b"", payload)


@pytest.fixture(scope="module")
def golden() -> dict[tuple[str, int], Message]:
    records = json.loads(VECTORS.read_text())
    return {
        (r["topic"].removeprefix("by-dev-").removeprefix("rootcoord-"), r["offset"]): decode(
            entry(base64.b64decode(r["value_b64"]))
        )
        for r in records
    }


Golden = dict[tuple[str, int], Message]


def inserted(message: Message) -> tuple[str, str, list[object]]:
    assert isinstance(message, Insert)
    return message.vchannel[-2:], message.partition_name, list(key_values(message.columns[0]))


def deleted(message: Message) -> tuple[int, str, list[object]]:
    assert isinstance(message, Delete)
    return message.partition_id, message.partition_name, list(message.keys)


def test_golden_log_decodes_to_what_was_done(golden: Golden) -> None:
    assert golden["dml_0", 0] == CreateCollection(C1, 470605312366215177)
    assert golden["dml_1", 0] == golden["dml_0", 0]
    assert inserted(golden["dml_0", 1]) == ("v0", "_default", [0, 1, 2, 4])
    assert inserted(golden["dml_0", 2]) == ("v0", "p1", [10])
    assert deleted(golden["dml_0", 3]) == (-1, "", [1, 2])
    assert inserted(golden["dml_1", 1]) == ("v1", "_default", [3])
    assert inserted(golden["dml_1", 2]) == ("v1", "p1", [11])
    assert inserted(golden["dml_2", 20]) == ("v0", "_default", ["a"])
    assert deleted(golden["dml_2", 21])[2] == ["a", "zz"]
    for channel, offset in (("dml_0", 42), ("dml_1", 43)):
        dropped = golden[channel, offset]
        assert isinstance(dropped, DropPartition)
        assert (dropped.collection_id, dropped.partition_name) == (C1, "p1")
    gone = golden["dml_2", 38]
    assert isinstance(gone, DropCollection)
    assert gone.collection_id == C10


def test_golden_upsert_halves_share_their_time_though_one_base_has_none(golden: Golden) -> None:
    insert, delete = golden["dml_1", 3], golden["dml_1", 4]
    assert isinstance(insert, Insert)
    assert isinstance(delete, Delete)
    assert insert.ts == delete.ts == 470605312379060235
    assert deleted(delete)[1:] == ("_default", [3])
    assert delete.partition_id == insert.partition_id > 0


def test_golden_ticks_and_operations(golden: Golden) -> None:
    ticks = [m for (topic, _), m in golden.items() if topic == "dml_0" and isinstance(m, Tick)]
    assert len(ticks) == 60
    assert [t.ts for t in ticks] == sorted(t.ts for t in ticks)
    operations = [golden["replicate-msg", offset] for offset in range(6)]
    assert [common_pb2.MsgType.Name(o.msg_type) for o in operations if isinstance(o, Other)] == [
        "CreateIndex",
        "Flush",
        "LoadCollection",
        "ReleaseCollection",
        "CreateDatabase",
        "DropDatabase",
    ]


def test_golden_tick_promise_holds_on_decoded_times(golden: Golden) -> None:
    for topic in ("dml_0", "dml_1", "dml_2"):
        ticked = 0
        for message in (m for (t, _), m in sorted(golden.items()) if t == topic):
            if isinstance(message, Tick):
                ticked = message.ts
            else:
                assert message.ts > ticked


def test_golden_columns_are_the_field_data_as_written(golden: Golden) -> None:
    message = golden["dml_0", 1]
    assert isinstance(message, Insert)
    assert [field_id(column) for column in message.columns] == [100, 101, 102, 103, 104]
    dynamic = schema_pb2.FieldData.FromString(message.columns[4])
    assert dynamic.is_dynamic
    assert b"dyn" in dynamic.scalars.json_data.data[3]


def insert(rows: int = 2, **changes: object) -> msg_pb2.InsertRequest:
    column = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    column.scalars.long_data.data.extend(range(rows))
    fields: dict[str, object] = {
        "base": common_pb2.MsgBase(msg_type=common_pb2.MsgType.Insert, msgID=7),
        "shardName": "by-dev-rootcoord-dml_0_5v0",
        "collectionID": 5,
        "partitionID": 6,
        "partition_name": "p",
        "timestamps": [11, 13][:rows] or [],
        "num_rows": rows,
        "version": msg_pb2.InsertDataVersion.ColumnBased,
        "fields_data": [column],
    }
    return msg_pb2.InsertRequest(**(fields | changes))


def delete(**changes: object) -> msg_pb2.DeleteRequest:
    fields: dict[str, object] = {
        "base": common_pb2.MsgBase(msg_type=common_pb2.MsgType.Delete, msgID=8),
        "shardName": "by-dev-rootcoord-dml_0_5v0",
        "collectionID": 5,
        "partitionID": -1,
        "timestamps": [13, 11],
        "num_rows": 2,
        "primary_keys": schema_pb2.IDs(int_id=schema_pb2.LongArray(data=[-1, 2])),
    }
    return msg_pb2.DeleteRequest(**(fields | changes))


def decoded(message: msg_pb2.InsertRequest | msg_pb2.DeleteRequest) -> Message:
    return decode(entry(message.SerializeToString()))


def test_insert_takes_the_largest_row_time_and_keeps_message_id_and_size() -> None:
    message = decoded(insert())
    assert isinstance(message, Insert)
    assert (message.ts, message.msg_id, message.num_rows) == (13, 7, 2)
    assert message.size == len(insert().SerializeToString())


def test_delete_keys_of_both_kinds_and_of_the_old_field() -> None:
    new = decoded(delete())
    old = decoded(delete(primary_keys=None, int64_primary_keys=[-1, 2]))
    text = decoded(delete(primary_keys=schema_pb2.IDs(str_id=schema_pb2.StringArray(data="äb"))))
    for message in (new, old):
        assert isinstance(message, Delete)
        assert isinstance(message.keys, np.ndarray)
        assert message.keys.tolist() == [-1, 2]
        assert message.ts == 13
    assert isinstance(text, Delete)
    assert text.keys == ("ä", "b")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (insert(version=0), "ROW_BASED_INSERT"),
        (insert(row_data=[common_pb2.Blob(value=b"x")]), "ROW_BASED_INSERT"),
        (insert(timestamps=[11]), "UNDECODABLE_MESSAGE"),
        (insert(timestamps=[0, 0]), "UNDECODABLE_MESSAGE"),
        (insert(rows=0), "UNDECODABLE_MESSAGE"),
        (insert(fields_data=[]), "UNDECODABLE_MESSAGE"),
        (insert(fields_data=[schema_pb2.FieldData()]), "UNDECODABLE_MESSAGE"),
        (insert(shardName=""), "UNDECODABLE_MESSAGE"),
        (insert(collectionID=0), "UNDECODABLE_MESSAGE"),
        (insert(base=common_pb2.MsgBase(msg_type="Upsert")), "UNDECODABLE_MESSAGE"),
        (insert(base=common_pb2.MsgBase(msg_type="Import")), "UNDECODABLE_MESSAGE"),
        (insert(base=None), "UNDECODABLE_MESSAGE"),
        (delete(num_rows=3), "UNDECODABLE_MESSAGE"),
        (delete(num_rows=0, timestamps=[], primary_keys=None), "UNDECODABLE_MESSAGE"),
        (delete(primary_keys=None), "UNDECODABLE_MESSAGE"),
        (delete(timestamps=[1]), "UNDECODABLE_MESSAGE"),
        (delete(serialized_expr_plan=b"plan"), "PREDICATE_DELETE"),
    ],
)
def test_what_is_not_a_whole_message_raises(
    message: msg_pb2.InsertRequest | msg_pb2.DeleteRequest, reason: str
) -> None:
    with pytest.raises(BugError) as caught:
        decoded(message)
    assert caught.value.reason == reason


def test_undecodable_message_shows_its_first_bytes() -> None:
    with pytest.raises(BugError, match="ffee01") as caught:
        decode(entry(b"\xff\xee\x01"))
    assert caught.value.reason == "UNDECODABLE_MESSAGE"
    with pytest.raises(BugError, match="0 bytes"):
        decode(entry(b""))


def test_a_cut_off_message_never_decodes() -> None:
    for message in (insert(), delete()):
        whole = message.SerializeToString()
        for size in range(len(whole)):
            with pytest.raises(BugError):
                decode(entry(whole[:size]))


def test_streaming_entries_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"2\.6") as caught:
        decode(LogEntry(b"", insert().SerializeToString(), streaming=True))
    assert caught.value.reason == "STREAMING_FORMAT"


def test_a_base_that_is_not_first_is_found() -> None:
    whole = insert().SerializeToString()
    size = 2 + whole[1]
    assert decode(entry(whole[size:] + whole[:size])) == decode(entry(whole))


def test_types_that_carry_rows_are_never_taken_for_harmless() -> None:
    for name in ("Insert", "Delete", "Upsert", "Import", "TruncateCollection", "DropPartition"):
        assert common_pb2.MsgType.Value(name) not in NO_ROW_TYPES


@given(st.binary(max_size=300))
def test_random_bytes_decode_or_raise_ours(payload: bytes) -> None:
    try:
        decode(entry(payload))
    except CdcError:
        pass


@given(st.data())
def test_a_damaged_message_decodes_or_raises_ours(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([insert(), delete()])).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(entry(bytes(whole)))
    except CdcError:
        pass
