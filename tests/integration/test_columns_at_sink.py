"""Columns cut and joined by us are stored exactly by a real sink, read back through its API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from milvus_cdc.codec.columns import concat, select_rows
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from pymilvus import DataType, MilvusClient
from pymilvus.grpc_gen import milvus_pb2, schema_pb2

from tests.servers import Stack

DIM = 16
COLLECTION = "columns_at_sink"


def column(name: str, kind: int, data: str, values: list[Any]) -> bytes:
    field = schema_pb2.FieldData(type=kind, field_name=name, is_dynamic=name == "$meta")
    getattr(field.scalars, data).data.extend(values)
    serialized: bytes = field.SerializeToString()
    return serialized


def row(key: int) -> dict[str, Any]:
    return {
        "id": key,
        "s": f"é{key}" * (abs(key) % 7),
        "j": {"a": [key, None]},
        "arr": [-key, key][: abs(key) % 3],
        "b": key % 2 == 0,
        "i": -key * 1000,
        "d": key / 3,
        "f": float(np.float32(key / 7)),
        "v": [float(np.float32(key * 0.1 + k)) for k in range(DIM)],
        "dyn": str(key),
    }


def chunk(keys: list[int]) -> list[bytes]:
    """Rows as one insert of the log holds them."""
    rows = [row(key) for key in keys]
    array = schema_pb2.FieldData(type=schema_pb2.Array, field_name="arr")
    array.scalars.array_data.element_type = schema_pb2.Int32
    for one in rows:
        array.scalars.array_data.data.add().int_data.data.extend(one["arr"])
    floats = schema_pb2.FieldData(type=schema_pb2.FloatVector, field_name="v")
    floats.vectors.dim = DIM
    floats.vectors.float_vector.data.extend(x for one in rows for x in one["v"])
    return [
        column("id", schema_pb2.Int64, "long_data", keys),
        column("s", schema_pb2.VarChar, "string_data", [one["s"] for one in rows]),
        column("j", schema_pb2.JSON, "json_data", [json.dumps(one["j"]).encode() for one in rows]),
        array.SerializeToString(),
        column("b", schema_pb2.Bool, "bool_data", [one["b"] for one in rows]),
        column("i", schema_pb2.Int32, "int_data", [one["i"] for one in rows]),
        column("d", schema_pb2.Double, "double_data", [one["d"] for one in rows]),
        column("f", schema_pb2.Float, "float_data", [one["f"] for one in rows]),
        floats.SerializeToString(),
        column(
            "$meta",
            schema_pb2.JSON,
            "json_data",
            [json.dumps({"dyn": one["dyn"]}).encode() for one in rows],
        ),
    ]


def binary_chunk(keys: list[int]) -> list[bytes]:
    vectors = schema_pb2.FieldData(type=schema_pb2.BinaryVector, field_name="v")
    vectors.vectors.dim = DIM
    vectors.vectors.binary_vector = b"".join(key.to_bytes(2, "big") for key in keys)
    return [column("id", schema_pb2.Int64, "long_data", keys), vectors.SerializeToString()]


@pytest.fixture
def sink(nats_stack: Stack) -> Iterator[MilvusClient]:
    admin = MilvusClient(uri=nats_stack.sink.uri)
    admin.create_database(COLLECTION)
    client = MilvusClient(uri=nats_stack.sink.uri, db_name=COLLECTION)
    yield client
    client.drop_collection(COLLECTION)
    client.close()
    admin.drop_database(COLLECTION)
    admin.close()


def insert(stack: Stack, columns: list[bytes], rows: int) -> None:
    request = log_pb2.RowsRequest(
        base=log_pb2.WriteBase(msg_type=400),
        db_name=COLLECTION,
        collection_name=COLLECTION,
        fields_data=columns,
        num_rows=rows,
    )
    with grpc.insecure_channel(stack.sink.address) as channel:
        call = channel.unary_unary(
            "/milvus.proto.milvus.MilvusService/Insert",
            request_serializer=log_pb2.RowsRequest.SerializeToString,
            response_deserializer=milvus_pb2.MutationResult.FromString,
        )
        answer = call(request, timeout=30)
    assert answer.status.code == 0, answer.status
    assert answer.insert_cnt == rows


CHUNKS = [list(range(-20, -10)), [1], list(range(2, 40))]


def test_joined_and_cut_columns_of_every_scalar_type(nats_stack: Stack, sink: MilvusClient) -> None:
    schema = sink.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("s", DataType.VARCHAR, max_length=200)
    schema.add_field("j", DataType.JSON)
    schema.add_field("arr", DataType.ARRAY, element_type=DataType.INT32, max_capacity=5)
    schema.add_field("b", DataType.BOOL)
    schema.add_field("i", DataType.INT32)
    schema.add_field("d", DataType.DOUBLE)
    schema.add_field("f", DataType.FLOAT)
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=DIM)
    create(sink, schema, "FLAT", "L2")
    joined = [concat(parts) for parts in zip(*map(chunk, CHUNKS), strict=True)]
    keys = [key for part in CHUNKS for key in part]
    insert(nats_stack, joined, len(keys))
    more, keep = list(range(5000, 5040)), range(0, 40, 3)
    cut = [
        concat([select_rows(whole, keep), other])
        for whole, other in zip(chunk(more), chunk([9999]), strict=True)
    ]
    keys += [*(more[k] for k in keep), 9999]
    insert(nats_stack, cut, len(keep) + 1)
    stored = {one["id"]: dict(one) for one in everything(sink)}
    assert stored == {key: row(key) for key in keys}


def test_joined_and_cut_binary_vectors(nats_stack: Stack, sink: MilvusClient) -> None:
    schema = sink.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("v", DataType.BINARY_VECTOR, dim=DIM)
    create(sink, schema, "BIN_FLAT", "HAMMING")
    parts = [binary_chunk(keys) for keys in ([1, 2, 3], [400], [5000, 6000])]
    parts.append([select_rows(one, [0, 2]) for one in binary_chunk([7, 8, 9])])
    insert(nats_stack, [concat(columns) for columns in zip(*parts, strict=True)], 8)
    stored = {one["id"]: one["v"][0] for one in everything(sink)}
    assert stored == {key: key.to_bytes(2, "big") for key in (1, 2, 3, 400, 5000, 6000, 7, 9)}


def create(sink: MilvusClient, schema: Any, index: str, metric: str) -> None:
    params = sink.prepare_index_params()
    params.add_index("v", index_type=index, metric_type=metric)
    sink.create_collection(COLLECTION, schema=schema, index_params=params)


def everything(sink: MilvusClient) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = sink.query(
        COLLECTION, "id > -100000", output_fields=["*"], consistency_level="Strong"
    )
    return rows
