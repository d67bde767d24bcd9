"""Row-exact comparison of a collection at a source and at a sink."""

from milvus_cdc.verify.connection import MilvusReads, Reads
from milvus_cdc.verify.engine import verify_collection
from milvus_cdc.verify.report import (
    WAITING_FOR_SINK,
    CollectionResult,
    Difference,
    DifferenceKind,
    OnEvent,
    Progress,
    Target,
)

__all__ = [
    "WAITING_FOR_SINK",
    "CollectionResult",
    "Difference",
    "DifferenceKind",
    "MilvusReads",
    "OnEvent",
    "Progress",
    "Reads",
    "Target",
    "verify_collection",
]
