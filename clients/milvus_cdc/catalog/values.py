"""The values below a source's keys, read into the nouns of `milvus_cdc.model`; pure.

Laws: a value that does not parse, or that speaks of another object than its key, is a BugError that
names the key; an object in state Creating does not exist yet; everything about a dropped object
that Milvus has already removed is simply missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from milvuscdc.internal import milvus_meta_pb2 as meta_pb

from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import (
    Alias,
    Collection,
    Database,
    Index,
    Load,
    LoadKind,
    ObjectState,
    Partition,
    Vchannel,
    ms_to_tso,
)

M = TypeVar("M", bound=Message)

_CREATED, _CREATING, _DROPPING, _DROPPED = 0, 1, 2, 3
# milvus.proto.etcd.DatabaseState: unknown, created, creating, dropping, dropped.
_DATABASE_CREATING, _DATABASE_STATES = 2, 5
_LOADED = 2
"""`LoadStatus.Loaded` of Milvus' query_coord.proto; 1 while it loads."""
_LOAD_KINDS = {0: LoadKind.COLLECTION, 1: LoadKind.PARTITIONS, 2: LoadKind.COLLECTION}


@dataclass(frozen=True, slots=True)
class Entry:
    """A key, in full so that an error can name it, and its value."""

    key: str
    value: bytes


@dataclass(slots=True)
class Parts:
    """All keys of one collection id, undecoded. `infos` is by database id, 0 in the layout without
    databases.
    """

    infos: dict[int, Entry] = field(default_factory=dict)
    partitions: dict[int, Entry] = field(default_factory=dict)
    fields: dict[int, Entry] = field(default_factory=dict)
    functions: dict[int, Entry] = field(default_factory=dict)
    indexes: dict[int, Entry] = field(default_factory=dict)
    load: Entry | None = None
    partition_loads: dict[int, Entry] = field(default_factory=dict)
    info_snapshots: set[int] = field(default_factory=set)
    """TSOs of the snapshots of the collection's own key."""
    partition_snapshots: dict[int, set[int]] = field(default_factory=dict)

    def empty(self) -> bool:
        return not any(getattr(self, each) for each in self.__slots__)


def undecodable(key: str, why: str) -> BugError:
    return BugError(
        "SOURCE_METADATA_UNDECODABLE",
        f"etcd key {key}: {why}; is it written by a Milvus between 2.2 and 2.5?",
    )


def parse(message: type[M], entry: Entry) -> M:
    """Raises BugError SOURCE_METADATA_UNDECODABLE naming the key."""
    try:
        return message.FromString(entry.value)
    except DecodeError as error:
        head = entry.value[:16].hex()
        raise undecodable(
            entry.key, f"not a {message.DESCRIPTOR.name} ({len(entry.value)} bytes, {head}…)"
        ) from error


def _check_id(entry: Entry, wanted: int, found: int) -> None:
    if wanted != found:
        raise undecodable(entry.key, f"its value is that of id {found}")


def _state(entry: Entry, state: int) -> ObjectState | None:
    """None: not created yet."""
    if state == _CREATING:
        return None
    if state == _CREATED:
        return ObjectState.CREATED
    if state in (_DROPPING, _DROPPED):
        return ObjectState.DROPPED
    raise undecodable(entry.key, f"unknown state {state}")


def decode_tso(entry: Entry) -> int:
    """TSO of a timestamp key: Unix nanoseconds, 8 bytes big-endian (seen on 2.2.16 and 2.3.5).

    It is the end of the time that the source has reserved (about 3 s ahead), so it only grows.
    """
    if len(entry.value) != 8:
        raise undecodable(entry.key, f"{len(entry.value)} bytes instead of 8")
    return ms_to_tso(int.from_bytes(entry.value, "big") // 1_000_000)


def decode_database(entry: Entry, database_id: int) -> Database | None:
    """None while it is being created."""
    info = parse(meta_pb.DatabaseInfo, entry)
    _check_id(entry, database_id, info.id)
    if info.state >= _DATABASE_STATES or not info.name:
        raise undecodable(entry.key, f"unknown state {info.state}, or no name")
    if info.state == _DATABASE_CREATING:
        return None
    created = info.state < _DATABASE_CREATING
    return Database(
        info.id,
        info.name,
        ObjectState.CREATED if created else ObjectState.DROPPED,
        _pairs(info.properties),
    )


def decode_alias(entry: Entry, name: str, database: str, database_id: int, ts: int) -> Alias | None:
    """None while it is not there (yet, or any more). `ts` is its newest snapshot.

    Its created_time is that of its newest change (seen on 2.3.5), which is also the snapshot's.
    """
    info = parse(meta_pb.AliasInfo, entry)
    if info.alias_name != name or not info.collection_id:
        raise undecodable(entry.key, f"its value is that of alias {info.alias_name!r}")
    if _state(entry, info.state) is not ObjectState.CREATED:
        return None
    alter_ts = max(info.created_time, ts)
    return Alias(database_id, database, name, info.collection_id, alter_ts)


def decode_incarnation(entry: Entry) -> int:
    """Creation time of a database, Unix nanoseconds."""
    return parse(meta_pb.DatabaseInfo, entry).created_time


def decode_collection(
    collection_id: int, parts: Parts, databases: Mapping[int, str]
) -> Collection | None:
    """None when it does not exist (yet). `databases` has names, also of databases gone by now."""
    if not parts.infos:
        return None
    database_id, entry = max(parts.infos.items())
    info = parse(meta_pb.CollectionInfo, entry)
    _check_id(entry, collection_id, info.id)
    state = _state(entry, info.state)
    if state is None:
        return None
    dropped = state is ObjectState.DROPPED
    drop_ts = max(parts.info_snapshots, default=0) if dropped else 0
    database_id = database_id or 1
    if database_id not in databases and not dropped:
        raise undecodable(entry.key, f"there is no database {database_id}")
    schema = _schema(entry, info, parts)
    names = {each.fieldID: each.name for each in schema.fields}
    if not names and not dropped:
        raise undecodable(entry.key, "it has no fields")
    partitions = _partitions(parts, dropped, drop_ts)
    return Collection(
        collection_id=collection_id,
        database_id=database_id,
        database=databases.get(database_id, ""),
        name=schema.name,
        schema=schema.SerializeToString(deterministic=True),
        shards=info.shards_num,
        consistency_level=info.consistency_level,
        create_ts=info.create_time,
        properties=_pairs(info.properties),
        state=state,
        drop_ts=drop_ts,
        partitions=partitions,
        indexes=() if dropped else _indexes(parts, schema),
        load=Load() if dropped else _load(parts, partitions),
        vchannels=_vchannels(entry, info),
        alter_ts=max(parts.info_snapshots, default=0),
    )


def _pairs(pairs: Iterable[meta_pb.KeyValue]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((pair.key, pair.value) for pair in pairs))


def _schema(
    entry: Entry, info: meta_pb.CollectionInfo, parts: Parts
) -> schema_pb2.CollectionSchema:
    schema = parse(schema_pb2.CollectionSchema, Entry(entry.key, info.schema))
    if not schema.name:
        raise undecodable(entry.key, "its schema has no name")
    if parts.fields:
        del schema.fields[:]
    for field_id, field_entry in sorted(parts.fields.items()):
        one = parse(schema_pb2.FieldSchema, field_entry)
        _check_id(field_entry, field_id, one.fieldID)
        schema.fields.append(one)
    if parts.functions:
        del schema.functions[:]
    for function_id, function_entry in sorted(parts.functions.items()):
        function = parse(schema_pb2.FunctionSchema, function_entry)
        _check_id(function_entry, function_id, function.id)
        schema.functions.append(function)
    return schema


def _partitions(parts: Parts, all_dropped: bool, drop_ts: int) -> tuple[Partition, ...]:
    partitions = []
    for partition_id, entry in sorted(parts.partitions.items()):
        info = parse(meta_pb.PartitionInfo, entry)
        _check_id(entry, partition_id, info.partition_id)
        state = _state(entry, info.state)
        if state is None:
            continue
        own_ts = 0
        if state is ObjectState.DROPPED:
            own_ts = max(parts.partition_snapshots.get(partition_id, ()), default=0)
        partitions.append(
            Partition(
                partition_id,
                info.partition_name,
                info.partition_created_timestamp,
                ObjectState.DROPPED if all_dropped else state,
                own_ts or (drop_ts if all_dropped else 0),
            )
        )
    return tuple(partitions)


def _indexes(parts: Parts, schema: schema_pb2.CollectionSchema) -> tuple[Index, ...]:
    fields = {each.fieldID: each for each in schema.fields}
    indexes = []
    for index_id, entry in sorted(parts.indexes.items()):
        value = parse(meta_pb.FieldIndex, entry)
        info = value.index_info
        _check_id(entry, index_id, info.index_id)
        if value.deleted:
            continue
        if info.field_id not in fields:
            raise undecodable(entry.key, f"its collection has no field {info.field_id}")
        of_field = fields[info.field_id]
        indexes.append(
            Index(
                index_id,
                info.index_name,
                info.field_id,
                of_field.name,
                _index_params(info, {(pair.key, pair.value) for pair in of_field.type_params}),
                value.create_time,
            )
        )
    return tuple(indexes)


def _index_params(
    info: meta_pb.IndexInfo, field_params: set[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """What the user gave to CreateIndex where Milvus kept it, so AUTOINDEX stays AUTOINDEX.

    The flag is_auto_index is not to be relied on: 2.3.5 leaves it unset for AUTOINDEX on vectors.
    Type parameters that repeat the field's own (dim, max_length) are no part of the request.
    """
    types = {pair.key: pair.value for pair in info.type_params}
    own = {key: value for key, value in types.items() if (key, value) not in field_params}
    given = {pair.key: pair.value for pair in info.user_index_params or info.index_params}
    return tuple(sorted((own | _unfolded(given)).items()))


def _unfolded(params: dict[str, str]) -> dict[str, str]:
    """Clients send the parameters of an index one by one or as JSON under `params`; here one by
    one.
    """
    try:
        folded = json.loads(params.get("params", ""))
    except (ValueError, RecursionError):
        return params
    if not isinstance(folded, dict):
        return params
    rest = {key: value for key, value in params.items() if key != "params"}
    return rest | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in folded.items()
    }


def _load(parts: Parts, partitions: Iterable[Partition]) -> Load:
    """2.2 writes no load type, and for loaded partitions no key of the collection (seen).

    Of a collection that was loaded as a whole, 2.3.5 tells by the missing key alone that a
    partition is released; a new one has its key before it is created. Keys come one by one while
    it loads (all seen).
    """
    loads = {}
    for partition_id, entry in sorted(parts.partition_loads.items()):
        loads[partition_id] = parse(meta_pb.PartitionLoadInfo, entry)
        _check_id(entry, partition_id, loads[partition_id].partition_id)
    if parts.load is None:
        replicas = max((each.replica_number for each in loads.values()), default=0)
        return Load(LoadKind.PARTITIONS, tuple(loads), replicas) if loads else Load()
    info = parse(meta_pb.CollectionLoadInfo, parts.load)
    if info.load_type not in _LOAD_KINDS:
        raise undecodable(parts.load.key, f"unknown load type {info.load_type}")
    alive = {each.partition_id for each in partitions if each.state is ObjectState.CREATED}
    if info.released_partitions:
        left = tuple(sorted(alive.difference(info.released_partitions)))
        return Load(LoadKind.PARTITIONS, left, info.replica_number)
    kind = _LOAD_KINDS[info.load_type]
    if loads and info.status == _LOADED and alive - loads.keys():
        kind = LoadKind.PARTITIONS
    return Load(kind, tuple(loads) if kind is LoadKind.PARTITIONS else (), info.replica_number)


def _vchannels(entry: Entry, info: meta_pb.CollectionInfo) -> tuple[Vchannel, ...]:
    """A start position is empty where the source has stored none."""
    names, topics = info.virtual_channel_names, info.physical_channel_names
    if len(names) != len(topics):
        raise undecodable(entry.key, f"{len(names)} vchannels for {len(topics)} pchannels")
    starts = {start.key: start.data for start in info.start_positions}
    return tuple(
        Vchannel(vchannel, pchannel, starts.get(pchannel, b""))
        for vchannel, pchannel in zip(names, topics, strict=True)
    )
