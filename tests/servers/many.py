"""A source with very many collections, as its etcd shows it: the keys of a real collection of
Milvus 2.3.5, again and again under other ids and names.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from milvus_cdc.milvus_protos import schema_pb2
from milvuscdc.internal import etcd_rpc_pb2 as etcd_pb
from milvuscdc.internal import etcd_rpc_pb2_grpc as etcd_rpc
from milvuscdc.internal import milvus_meta_pb2 as meta_pb

_DUMP = Path(__file__).parents[1] / "vectors" / "golden_etcd_2.3.5.json"
_REAL = {key: base64.b64decode(text) for key, text in json.loads(_DUMP.read_text()).items()}
_COLLECTION = 470605299854082291
_ROOT = "by-dev/"
_IDS_PER_COLLECTION = 1_000
_TXN_PUTS = 120

Put = tuple[str, bytes]


def name_of(number: int) -> str:
    return f"many_{number:06d}"


def collection_id_of(number: int) -> int:
    return _COLLECTION + (number + 1) * _IDS_PER_COLLECTION


def cluster_keys(root_path: str) -> list[Put]:
    """What there is once: the default database, users, the clock."""
    keys = [
        (_moved(key, root_path), value)
        for key, value in _REAL.items()
        if re.search(r"/db-info/1(_ts|$)", key)
    ]
    return [*keys, (f"{root_path}/kv/gid/timestamp", (1_795_000_000 * 10**9).to_bytes(8, "big"))]


def collection_keys(number: int, root_path: str, description: str = "") -> Iterator[Put]:
    """All keys of one collection: 2 shards, 2 partitions, 7 fields, an index, and snapshots."""
    own = collection_id_of(number)
    for key, value in _REAL.items():
        if f"/{_COLLECTION}" not in key or "datacoord-meta" in key or "channelwatch" in key:
            continue
        place = key.replace(str(_COLLECTION), str(own))
        if "/partitions/" in key:
            partition = meta_pb.PartitionInfo.FromString(value)
            if partition.collection_id:
                place = place.replace(
                    str(partition.partition_id), str(_moved_id(partition.partition_id, own))
                )
                partition.partition_id = _moved_id(partition.partition_id, own)
                partition.collection_id = own
                value = partition.SerializeToString()
        elif "/collection-info/" in key:
            value = _info(value, number, description)
        elif "/field-index/" in key:
            index = meta_pb.FieldIndex.FromString(value)
            place = place.replace(
                str(index.index_info.index_id), str(_moved_id(index.index_info.index_id, own))
            )
            index.index_info.index_id = _moved_id(index.index_info.index_id, own)
            index.index_info.collection_id = own
            value = index.SerializeToString()
        yield _moved(place, root_path), value


def info_key(number: int, root_path: str) -> str:
    """The one key that changes when its description does."""
    return f"{root_path}/meta/root-coord/database/collection-info/1/{collection_id_of(number)}"


def put_all(endpoint: str, puts: Iterator[Put] | Sequence[Put]) -> int:
    """Writes them in large transactions; how many there were."""
    count = 0
    with grpc.insecure_channel(endpoint) as channel:
        stub = etcd_rpc.KVStub(channel)
        waiting: list[etcd_pb.RequestOp] = []
        for key, value in puts:
            put = etcd_pb.PutRequest(key=key.encode(), value=value)
            waiting.append(etcd_pb.RequestOp(request_put=put))
            count += 1
            if len(waiting) == _TXN_PUTS:
                stub.Txn(etcd_pb.TxnRequest(success=waiting), timeout=30)
                waiting = []
        if waiting:
            stub.Txn(etcd_pb.TxnRequest(success=waiting), timeout=30)
    return count


def _info(value: bytes, number: int, description: str) -> bytes:
    own = collection_id_of(number)
    info = meta_pb.CollectionInfo.FromString(value)
    info.id = own
    schema = schema_pb2.CollectionSchema.FromString(info.schema)
    schema.name = name_of(number)
    schema.description = description
    info.schema = schema.SerializeToString()
    for shard, vchannel in enumerate(info.virtual_channel_names):
        info.virtual_channel_names[shard] = vchannel.replace(str(_COLLECTION), str(own))
    return info.SerializeToString()


def _moved_id(number: int, own: int) -> int:
    return number - _COLLECTION + own


def _moved(key: str, root_path: str) -> str:
    return key.replace(_ROOT, f"{root_path}/", 1)
