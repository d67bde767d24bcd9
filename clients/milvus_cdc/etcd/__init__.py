"""An asyncio client of etcd's v3 API on generated stubs: keys, transactions, leases, watches."""

from milvus_cdc.etcd.client import EtcdClient
from milvus_cdc.etcd.login import EtcdSecurity
from milvus_cdc.etcd.records import (
    Answer,
    Compacted,
    Compare,
    CompareOp,
    CompareTarget,
    CompareValue,
    Deleted,
    DeleteOp,
    GetOp,
    KeyRange,
    KeyValue,
    LeaseGrant,
    Listing,
    PutOp,
    TxnAnswer,
    WatchBatch,
    WatchEvent,
    WatchLost,
)
from milvus_cdc.etcd.watching import Watch

__all__ = [
    "Answer",
    "Compacted",
    "Compare",
    "CompareOp",
    "CompareTarget",
    "CompareValue",
    "DeleteOp",
    "Deleted",
    "EtcdClient",
    "EtcdSecurity",
    "GetOp",
    "KeyRange",
    "KeyValue",
    "LeaseGrant",
    "Listing",
    "PutOp",
    "TxnAnswer",
    "Watch",
    "WatchBatch",
    "WatchEvent",
    "WatchLost",
]
