"""A replicator whose requests are built and then dropped: what reading, ordering and joining cost
by themselves. Everything but rows (collections, indexes) really reaches the sink.
"""

from __future__ import annotations

import sys

from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.sink.milvus import MilvusSink
from milvus_cdc.sink.milvus.requests import MilvusTarget
from milvus_cdc_replicator import app, connections


class DiscardingSink(MilvusSink):
    async def _send(
        self, method: str, target: MilvusTarget, request: bytes, deadline: float
    ) -> milvus_pb2.MutationResult:
        return milvus_pb2.MutationResult()


if __name__ == "__main__":
    vars(connections)["MilvusSink"] = DiscardingSink
    sys.exit(app.main())
