"""Insert requests made beforehand as bytes, so that writing measures the servers and not the
writer.

A collection has an Int64 key and one float vector. Law: a key occurs once in a collection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from milvus_cdc.codec.wire import delimited, encode_varint
from milvus_cdc.milvus_protos import milvus_pb2, schema_pb2
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient

INSERT = "/milvus.proto.milvus.MilvusService/Insert"
SHARDS = 2
POOL_ROWS = 16_384
_MSG_INSERT = 400


@dataclass(frozen=True, slots=True)
class Table:
    """A collection of the default database."""

    name: str
    dim: int


def create(uri: str, table: Table, *, loaded: bool = False, shards: int = SHARDS) -> None:
    """`loaded` brings an index with it, which loading needs."""
    client = MilvusClient(uri)
    try:
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=table.dim)
        client.create_collection(table.name, schema=schema, num_shards=shards)
        if loaded:
            index = client.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="L2")
            client.create_index(table.name, index)
            client.load_collection(table.name)
    finally:
        client.close()


def drop(uri: str, name: str) -> None:
    """Succeeds when there is none."""
    client = MilvusClient(uri)
    try:
        client.drop_collection(name)
    finally:
        client.close()


class Requests:
    """Makes requests for one table; the vectors are slices of a pool of random ones."""

    def __init__(self, table: Table, *, seed: int = 7) -> None:
        self.table = table
        self.pool: NDArray[np.float32] = np.random.default_rng(seed).random(
            (POOL_ROWS, table.dim), dtype=np.float32
        )
        self._vector_head = schema_pb2.FieldData(
            type=schema_pb2.DataType.FloatVector, field_name="vector"
        ).SerializeToString()

    def vectors(self, first_id: int, count: int) -> NDArray[np.float32]:
        start = first_id * 31 % (POOL_ROWS - count)
        return self.pool[start : start + count]

    def insert(self, first_id: int, count: int) -> bytes:
        """Rows with the keys from `first_id` on."""
        keys = schema_pb2.FieldData(type=schema_pb2.DataType.Int64, field_name="id")
        keys.scalars.long_data.data.extend(range(first_id, first_id + count))
        floats = delimited(1, self.vectors(first_id, count).tobytes())
        data = delimited(2, *floats)
        dim = b"\x08" + encode_varint(self.table.dim)
        vectors = b"".join([self._vector_head, *delimited(4, dim, *data)])
        request = log_pb2.RowsRequest(
            base=log_pb2.WriteBase(msg_type=_MSG_INSERT),
            collection_name=self.table.name,
            fields_data=[keys.SerializeToString(), vectors],
            num_rows=count,
        )
        return bytes(request.SerializeToString())


class Connection:
    """A connection of its own that takes requests as bytes."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._insert: Any = self._channel.unary_unary(
            INSERT, response_deserializer=milvus_pb2.MutationResult.FromString
        )

    def insert(self, request: bytes) -> None:
        """RuntimeError with the server's words when it refuses."""
        answer = self._insert(request, timeout=60)
        if answer.status.code or answer.status.error_code:
            raise RuntimeError(f"insert refused: {answer.status.reason}")

    def close(self) -> None:
        self._channel.close()
