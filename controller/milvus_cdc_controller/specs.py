"""The core's nouns as messages: what replicators and users are told of them."""

from __future__ import annotations

from dataclasses import fields

from google.protobuf import duration_pb2
from milvus_cdc.model import (
    Batching,
    Carry,
    Collection,
    Drift,
    Index,
    Load,
    LoadKind,
    ObjectState,
    RateLimits,
    Rbac,
    RoleGrant,
)
from milvuscdc.v1 import dead_letters_pb2, task_pb2
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord, Recount
from milvus_cdc_controller.core.mapping import split
from milvus_cdc_controller.core.task import MetadataRecord

_LOADS = {
    LoadKind.NONE: pb.LoadSpec.KIND_UNSPECIFIED,
    LoadKind.COLLECTION: pb.LoadSpec.KIND_COLLECTION,
    LoadKind.PARTITIONS: pb.LoadSpec.KIND_PARTITIONS,
}
DRIFTS = {Drift.REPAIR: task_pb2.DRIFT_REPAIR, Drift.REPORT: task_pb2.DRIFT_REPORT}
_PARTITIONS = {
    ObjectState.CREATED: pb.PartitionSpec.STATE_CREATED,
    ObjectState.DROPPED: pb.PartitionSpec.STATE_DROPPED,
}


def collection_spec(record: CollectionRecord, progress: CollectionProgress) -> pb.CollectionSpec:
    want = record.want
    renamed_from = None
    if record.renaming:
        database, name = split(record.at_sink)
        renamed_from = pb.SinkName(database=database, collection=name)
    applied = None
    if record.applied is not None:
        applied = pb.AppliedObjects(
            indexes=map(_index_spec, record.applied.indexes),
            load=_load_spec(record.applied.load),
            partition_ids=record.applied.partition_ids,
            alter_ts=record.applied.alter_ts,
            touched_indexes=record.applied.touched_indexes,
            touched_load=record.applied.touched_load,
        )
    source_database, _, source_collection = record.source_name.partition(".")
    recount = None if record.dropping else progress.recount
    return pb.CollectionSpec(
        collection_id=want.collection_id,
        database=want.database,
        collection=want.name,
        schema=want.schema,
        shards=want.shards,
        consistency_level=want.consistency_level,
        properties=dict(want.properties),
        create_ts=want.create_ts,
        state=(
            pb.CollectionSpec.STATE_DROPPING if record.dropping else pb.CollectionSpec.STATE_CREATED
        ),
        partitions=[
            pb.PartitionSpec(
                partition_id=p.partition_id,
                name=p.name,
                state=_PARTITIONS[p.state],
                create_ts=p.create_ts,
                drop_ts=p.drop_ts,
            )
            for p in want.partitions
        ],
        indexes=map(_index_spec, want.indexes),
        load=_load_spec(want.load),
        vchannels=_vchannel_specs(progress, recount),
        recount=_wanted(recount),
        opened=record.opened,
        sink_collection_id=record.sink_collection_id,
        recreate=record.recreate,
        drop_granted=record.drop_granted,
        flush_ts=record.flush_ts,
        awaited_ts=record.awaited_ts,
        renamed_from=renamed_from,
        rename_ts=record.rename_ts,
        source_database=source_database,
        source_collection=source_collection,
        alter_ts=want.alter_ts,
        applied=applied,
    )


def _wanted(recount: Recount | None) -> pb.Recount.ValueType:
    if recount is None:
        return pb.RECOUNT_UNSPECIFIED
    if recount.again and not recount.lost_again:
        return pb.RECOUNT_WRITE_AGAIN
    return pb.RECOUNT_WANTED


def _vchannel_specs(progress: CollectionProgress, recount: Recount | None) -> list[pb.VchannelSpec]:
    specs = [
        pb.VchannelSpec(
            vchannel=point.vchannel,
            pchannel=point.pchannel,
            read_from=point.read_from,
            resolved_ts=point.resolved_ts,
            horizon_ts=point.horizon_ts,
            closed=point.closed,
            incarnation=point.incarnation,
            stored_ts=point.stored_ts,
        )
        for point in progress.checkpoints
    ]
    if recount is None:
        return specs
    starts = {vchannel: (read_from, ts) for vchannel, read_from, ts in recount.starts}
    for spec in specs:
        if spec.vchannel not in starts:
            continue
        if recount.again:
            spec.read_from, spec.resolved_ts = starts[spec.vchannel]
        else:
            spec.recount_from, spec.recount_ts = starts[spec.vchannel]
    return specs


def planned_spec(planned: Collection) -> bytes:
    """What decides if a sink can hold a collection, serialized; names are those at the sink."""
    return pb.CollectionSpec(
        collection_id=planned.collection_id,
        database=planned.database,
        collection=planned.name,
        schema=planned.schema,
        partitions=[
            pb.PartitionSpec(partition_id=p.partition_id, name=p.name, state=_PARTITIONS[p.state])
            for p in planned.partitions
        ],
        indexes=map(_index_spec, planned.indexes),
    ).SerializeToString()


def _index_spec(index: Index) -> pb.IndexSpec:
    return pb.IndexSpec(
        index_id=index.index_id,
        name=index.name,
        field_id=index.field_id,
        field_name=index.field_name,
        params=dict(index.params),
        create_ts=index.create_ts,
    )


def _load_spec(load: Load) -> pb.LoadSpec:
    return pb.LoadSpec(
        kind=_LOADS[load.kind], partition_ids=load.partition_ids, replicas=load.replicas
    )


def carry_message(carry: Carry) -> task_pb2.Carry:
    """Every switch said."""
    return task_pb2.Carry(**{each.name: getattr(carry, each.name) for each in fields(Carry)})


def batching_message(batching: Batching) -> task_pb2.Batching | None:
    """None where the user said nothing."""
    if batching == Batching():
        return None
    linger = batching.linger_ms
    return task_pb2.Batching(
        max_rows=batching.max_rows,
        max_bytes=batching.max_bytes,
        linger=None if linger is None else duration(linger),
    )


def limits_message(limits: RateLimits) -> task_pb2.Limits | None:
    """None where there are none."""
    if limits == RateLimits():
        return None
    return task_pb2.Limits(
        rows_per_second=limits.rows_per_second,
        bytes_per_second=limits.bytes_per_second,
        requests_in_flight=limits.requests_in_flight,
        connections=limits.connections,
    )


def dead_letters_message(stored: bytes) -> dead_letters_pb2.DeadLetters | None:
    """None where there are none."""
    return dead_letters_pb2.DeadLetters.FromString(stored) if stored else None


def metadata_spec(metadata: MetadataRecord, carry: Carry) -> pb.MetadataSpec:
    properties = dict(metadata.database_properties)
    spec = pb.MetadataSpec(
        databases=[
            pb.DatabaseSpec(
                database_id=d.database_id,
                name=d.name,
                dropped=d.dropped,
                properties=dict(properties.get(d.name, ())),
            )
            for d in metadata.databases
            if carry.schema
        ],
        aliases=[
            pb.AliasSpec(database=a.database, alias=a.alias, collection=a.collection)
            for a in metadata.aliases
        ],
        dropped_aliases=[
            pb.SinkName(database=database, collection=alias)
            for database, alias, _ in metadata.dropped_aliases
        ],
        applied_version=metadata.applied_version,
    )
    if metadata.rbac is not None:
        spec.rbac.CopyFrom(_rbac_spec(metadata.rbac, metadata.dropped_rbac))
    if metadata.operations_channel:
        spec.operations.CopyFrom(
            pb.OperationsSpec(
                channel=metadata.operations_channel,
                read_from=metadata.operations_read_from,
                flush=carry.flush,
                credentials=carry.rbac,
            )
        )
    return spec


def _rbac_spec(rbac: Rbac, dropped: Rbac) -> pb.RbacSpec:
    return pb.RbacSpec(
        users=rbac.users,
        roles=rbac.roles,
        members=[pb.RoleMember(user=user, role=role) for user, role in rbac.members],
        grants=map(_grant_spec, rbac.grants),
        privilege_groups=[
            pb.PrivilegeGroupSpec(name=name, privileges=privileges)
            for name, privileges in rbac.privilege_groups
        ],
        dropped_roles=dropped.roles,
        dropped_members=[pb.RoleMember(user=user, role=role) for user, role in dropped.members],
        dropped_grants=map(_grant_spec, dropped.grants),
        dropped_privilege_groups=[name for name, _ in dropped.privilege_groups],
    )


def _grant_spec(grant: RoleGrant) -> pb.GrantSpec:
    return pb.GrantSpec(
        role=grant.role,
        object_type=grant.object_type,
        object_name=grant.object_name,
        database=grant.database,
        privilege=grant.privilege,
    )


def duration(milliseconds: int) -> duration_pb2.Duration:
    result = duration_pb2.Duration()
    result.FromMilliseconds(milliseconds)
    return result
