"""Integer keys as the expression grammar of Milvus can read them."""

from __future__ import annotations

import numpy as np
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.sink import DeleteBatch
from milvus_cdc.sink.milvus.requests import MilvusTarget, delete_requests


def test_the_smallest_integer_key_is_written_as_a_sum() -> None:
    target = MilvusTarget("d", "c", "id", partition_key=False)
    keys = np.array([-(2**63), -(2**63) + 1, 2**63 - 1], np.int64)
    (request,) = delete_requests(target, DeleteBatch("", keys))
    assert milvus_pb2.DeleteRequest.FromString(request).expr == (
        "id in [-9223372036854775807 - 1,-9223372036854775807,9223372036854775807]"
    )
