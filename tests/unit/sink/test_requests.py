"""Batches as requests: every row and key in exactly one, columns as they came."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.errors import BugError
from milvus_cdc.sink import DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.sink.memory_rows import decode_rows
from milvus_cdc.sink.milvus import requests
from pymilvus.grpc_gen import common_pb2, milvus_pb2, schema_pb2
from pymilvus.grpc_gen.schema_pb2 import DataType, FieldData

from tests.contract.sink_samples import KEY, PLAIN, TEXT_KEY, Sample, plain_rows

SAMPLE = Sample("db", "rows", PLAIN)
TARGET = requests.target_of(SAMPLE.want())


def chunks_of(sizes: list[int]) -> tuple[RowChunk, ...]:
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return tuple(
        SAMPLE.chunk(plain_rows(range(start, start + size)))
        for start, size in zip(starts, sizes, strict=True)
    )


def keys_in(batch: RowBatch) -> list[int]:
    return [row["id"] for chunk in batch.chunks for row in decode_rows(chunk)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 2_000), st.data())
def test_split_batches_hold_every_row_once_in_order(
    sizes: list[int], bytes_max: int, data: st.DataObject
) -> None:
    chunks = tuple(
        replace(chunk, keep=data.draw(st.sampled_from([None, tuple(range(0, size, 2))])))
        for chunk, size in zip(chunks_of(sizes), sizes, strict=True)
    )
    batch = RowBatch(Op.INSERT, "p", chunks)
    parts = requests.split_rows(batch, bytes_max)
    assert [key for part in parts for key in keys_in(part)] == keys_in(batch)
    assert {(part.op, part.partition) for part in parts} == {(Op.INSERT, "p")}
    assert all(requests.request_size(part) <= bytes_max or part.num_rows == 1 for part in parts)


@pytest.mark.parametrize("op", list(Op))
def test_a_request_is_one_that_milvus_understands(op: Op) -> None:
    batch = RowBatch(op, "p", chunks_of([2, 3]))
    kind = milvus_pb2.InsertRequest if op is Op.INSERT else milvus_pb2.UpsertRequest
    request = kind.FromString(requests.rows_request(TARGET, batch))
    wanted_type = common_pb2.MsgType.Insert if op is Op.INSERT else common_pb2.MsgType.Upsert
    assert request.base.msg_type == wanted_type
    assert (request.db_name, request.collection_name, request.partition_name) == ("db", "rows", "p")
    assert request.num_rows == 5
    assert [column.field_name for column in request.fields_data] == ["id", "v", "n"]
    assert list(request.fields_data[0].scalars.long_data.data) == [0, 1, 2, 3, 4]


def test_columns_are_matched_by_field_whatever_their_order() -> None:
    first, second = chunks_of([1, 2])
    turned = replace(second, columns=second.columns[::-1])
    joined = requests.rows_request(TARGET, RowBatch(Op.INSERT, "", (first, turned)))
    straight = requests.rows_request(TARGET, RowBatch(Op.INSERT, "", (first, second)))
    assert joined == straight


def test_messages_with_other_columns_are_not_joined() -> None:
    first, second = chunks_of([1, 2])
    for broken in (
        (first, replace(second, columns=second.columns[:2])),
        (replace(first, columns=first.columns[:2]), second),
        (replace(first, columns=(first.columns[0], *first.columns)),),
    ):
        with pytest.raises(BugError) as failed:
            requests.rows_request(TARGET, RowBatch(Op.INSERT, "", broken))
        assert failed.value.reason == "COLUMNS_DIFFER"


def test_system_columns_are_left_out() -> None:
    (chunk,) = chunks_of([1])
    row_ids = FieldData(type=DataType.Int64, field_name="Timestamp", field_id=1)
    row_ids.scalars.long_data.data.append(9)
    with_system = replace(chunk, columns=(row_ids.SerializeToString(), *chunk.columns))
    request = requests.rows_request(TARGET, RowBatch(Op.INSERT, "", (with_system,)))
    assert len(milvus_pb2.InsertRequest.FromString(request).fields_data) == 3


# ---- deletes


def deleted(keys: object, target: requests.MilvusTarget = TARGET) -> list[list[object]]:
    found = []
    for each in requests.delete_requests(target, DeleteBatch("p", keys)):  # type: ignore[arg-type]
        request = milvus_pb2.DeleteRequest.FromString(each)
        field, _, literals = request.expr.partition(" in ")
        assert field == target.key_field
        # The one key that the grammar cannot read as a literal is written as a sum.
        found.append(json.loads(literals.replace(f"{1 - 2**63} - 1", str(-(2**63)))))
    return found


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_text_keys_come_back_from_their_expression(keys: list[str]) -> None:
    assert [key for run in deleted(tuple(keys)) for key in run] == keys


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integer_keys_come_back_from_their_expression(keys: list[int]) -> None:
    assert [key for run in deleted(np.array(keys, np.int64)) for key in run] == keys


def test_deletes_are_cut_by_number_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(run) for run in deleted(np.arange(250_000))] == [100_000, 100_000, 50_000]
    monkeypatch.setattr(requests, "DELETE_BYTES_MAX", 50)
    keys = ("x" * 100, "ä" * 10, "b", "c", "d" * 40)
    runs = deleted(keys)
    assert [key for run in runs for key in run] == list(keys)
    assert [len(run) for run in runs] == [1, 3, 1]


def test_no_keys_no_request() -> None:
    assert deleted(()) == []
    assert deleted(np.array([], np.int64)) == []


def test_partition_key_tables_name_no_partition() -> None:
    field = replace(TEXT_KEY, name="t", primary=False, partition_key=True)
    sample = Sample("db", "rows", (KEY, field))
    target = requests.target_of(sample.want())
    (request,) = requests.delete_requests(target, DeleteBatch("_default_3", np.array([1])))
    assert milvus_pb2.DeleteRequest.FromString(request).partition_name == ""
    batch = sample.batch([{"id": 1, "t": "a"}], partition="_default_3")
    rows = milvus_pb2.InsertRequest.FromString(requests.rows_request(target, batch))
    assert rows.partition_name == ""


# ---- types of later versions, from the protos alone


def later_target(*fields: schema_pb2.FieldSchema) -> requests.MilvusTarget:
    schema = schema_pb2.CollectionSchema(name="rows", fields=[KEY.schema(100), *fields])
    return requests.target_of(replace(SAMPLE.want(), schema=schema.SerializeToString()))


def sent(target: requests.MilvusTarget, *columns: list[FieldData]) -> list[FieldData]:
    """The columns of a request that joins chunks given as lists of columns."""
    chunks = []
    for number, data in enumerate(columns):
        key = FieldData(type=DataType.Int64, field_name="id", field_id=100)
        key.scalars.long_data.data.extend([number * 2, number * 2 + 1])
        chunks.append(RowChunk(tuple(c.SerializeToString() for c in [key, *data]), 2))
    request = requests.rows_request(target, RowBatch(Op.INSERT, "", tuple(chunks)))
    return list(milvus_pb2.InsertRequest.FromString(request).fields_data)


def number_column(values: list[int], valid: list[bool] | None = None) -> FieldData:
    data = FieldData(type=DataType.Int64, field_name="n", field_id=101)
    data.scalars.long_data.data.extend(values)
    data.valid_data.extend(valid or [])
    return data


def test_nulls_have_no_value_in_a_request() -> None:
    target = later_target(
        schema_pb2.FieldSchema(fieldID=101, name="n", data_type=DataType.Int64, nullable=True)
    )
    for chunks in (
        [[number_column([7, 0], [True, False])]],
        [[number_column([7, 0], [True, False])], [number_column([0, 8], [False, True])]],
    ):
        column = sent(target, *chunks)[1]
        assert list(column.scalars.long_data.data) == [7, 8][: len(chunks)]
        assert list(column.valid_data) == [True, False, False, True][: 2 * len(chunks)]


def test_rows_of_a_field_with_a_default_are_called_valid() -> None:
    field = schema_pb2.FieldSchema(fieldID=101, name="n", data_type=DataType.Int64)
    field.default_value.long_data = 5
    (_, column) = sent(later_target(field), [number_column([7, 5])])
    assert list(column.scalars.long_data.data) == [7, 5]
    assert list(column.valid_data) == [True, True]


@pytest.mark.parametrize(
    ("kind", "part", "width"),
    [
        (DataType.Float16Vector, "float16_vector", 8),
        (DataType.BFloat16Vector, "bfloat16_vector", 8),
        (DataType.Int8Vector, "int8_vector", 4),
    ],
)
def test_short_vectors_are_joined_bit_for_bit(kind: int, part: str, width: int) -> None:
    def column(start: int) -> FieldData:
        data = FieldData(type=kind, field_name="v", field_id=101)
        data.vectors.dim = 4
        setattr(data.vectors, part, bytes(range(start, start + 2 * width)))
        return data

    target = later_target(schema_pb2.FieldSchema(fieldID=101, name="v", data_type=kind))
    joined = sent(target, [column(0)], [column(100)])[1]
    wanted = bytes(range(2 * width)) + bytes(range(100, 100 + 2 * width))
    assert getattr(joined.vectors, part) == wanted
    assert joined.vectors.dim == 4


def test_sparse_vectors_are_joined() -> None:
    def column(*rows: bytes) -> FieldData:
        data = FieldData(type=DataType.SparseFloatVector, field_name="v", field_id=101)
        data.vectors.sparse_float_vector.contents.extend(rows)
        data.vectors.dim = data.vectors.sparse_float_vector.dim = 10 * len(rows[0])
        return data

    first, second = column(b"12345678", b"abcdefgh"), column(b"12345678ABCDEFGH", b"")
    target = later_target(
        schema_pb2.FieldSchema(fieldID=101, name="v", data_type=DataType.SparseFloatVector)
    )
    joined = sent(target, [first], [second])[1].vectors
    assert list(joined.sparse_float_vector.contents) == [
        *first.vectors.sparse_float_vector.contents,
        *second.vectors.sparse_float_vector.contents,
    ]
    assert joined.dim == joined.sparse_float_vector.dim == 160


def test_outputs_of_functions_are_left_to_the_sink() -> None:
    target = later_target(
        schema_pb2.FieldSchema(
            fieldID=101, name="n", data_type=DataType.Int64, is_function_output=True
        )
    )
    assert [c.field_name for c in sent(target, [number_column([1, 2])])] == ["id"]
