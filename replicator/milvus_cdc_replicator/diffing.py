"""The diff job: how a sink differs from what a task's assignments want, rows aside.

Law: it only looks, a few collections at once, and says of each what its owner would find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from milvus_cdc.errors import CdcError
from milvus_cdc.model import Carry
from milvus_cdc.sink import Sink
from milvus_cdc.sink.differences import DESCRIPTION, Action, ObjectDifference
from milvuscdc.v1 import diff_pb2
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.drift import without_dropped
from milvus_cdc_replicator.gate import COMPARISONS
from milvus_cdc_replicator.source_properties import SourceProperties
from milvus_cdc_replicator.spec import carry_of, collection_of, metadata_wish

_ACTIONS = {
    Action.CREATE: diff_pb2.ObjectDifference.ACTION_CREATE,
    Action.ALTER: diff_pb2.ObjectDifference.ACTION_ALTER,
    Action.DROP: diff_pb2.ObjectDifference.ACTION_DROP,
}


async def diff_all(
    connections: Connections, job: pb.DiffJob, say: Callable[[pb.DiffUpdate], None]
) -> None:
    """Raises what the sink or the source answers."""
    sink = await connections.sink(job.sink)
    carry = carry_of(job.carry)
    if job.HasField("metadata") and (carry.schema or carry.rbac):
        _say_all(say, await sink.diff_metadata(metadata_wish(job.metadata)))
    done = 0
    todo = iter(job.collections)

    async def work() -> None:
        nonlocal done
        for spec in todo:
            _say_all(say, await _diff_one(connections, sink, job, spec, carry))
            done += 1
            progress = diff_pb2.DiffProgress(
                collections_done=done, collections_total=len(job.collections)
            )
            say(pb.DiffUpdate(progress=progress))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(COMPARISONS):
                group.create_task(work())
    except* CdcError as errors:
        raise errors.exceptions[0] from None
    say(pb.DiffUpdate(done=pb.DiffDone()))


async def _diff_one(
    connections: Connections, sink: Sink, job: pb.DiffJob, spec: pb.CollectionSpec, carry: Carry
) -> Iterable[ObjectDifference]:
    resolved = min((v.resolved_ts for v in spec.vchannels), default=0)
    want = without_dropped(collection_of(spec), resolved, frozenset())
    known = True
    if job.source.HasField("milvus") and carry.schema:
        properties = SourceProperties(partial(connections.source_client, job.source.milvus))
        try:
            want = replace(want, properties=await properties.of(want, spec.source_database))
        except CdcError:
            known = False  # those of the metadata may be old
    found = await sink.diff(want, carry, sink_collection_id=spec.sink_collection_id)
    return [d for d in found if known or d.kind != "property" or d.name == DESCRIPTION]


def _say_all(say: Callable[[pb.DiffUpdate], None], found: Iterable[ObjectDifference]) -> None:
    for each in found:
        difference = diff_pb2.ObjectDifference(
            action=_ACTIONS[each.action],
            kind=each.kind,
            database=each.database,
            collection=each.collection,
            name=each.name,
            detail=each.detail,
        )
        say(pb.DiffUpdate(difference=difference))
