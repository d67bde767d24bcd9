"""Shared nouns, standard library only: the words of the design as types.

A TSO (timestamp oracle) is Milvus' 64-bit hybrid time: Unix milliseconds << 18 | logical counter
(milvus `pkg/util/tsoutil`). Positions are opaque bytes that only the queue adapter which made them
can compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

TSO_LOGICAL_BITS = 18


def tso_to_ms(tso: int) -> int:
    """Unix milliseconds of a TSO."""
    return tso >> TSO_LOGICAL_BITS


def ms_to_tso(unix_ms: int) -> int:
    """The first TSO of a Unix millisecond."""
    return unix_ms << TSO_LOGICAL_BITS


def ms_to_text(unix_ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    seconds, ms = divmod(unix_ms, 1000)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms:03}Z"


def tso_to_text(tso: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return ms_to_text(tso_to_ms(tso))


def split_assignment_id(assignment_id: str) -> tuple[str, int | None]:
    """Task uid and collection id of an assignment, or of a part; None for the task's metadata
    assignment.
    """
    uid, _, tail = assignment_id.rpartition(".")
    return uid, None if tail == "metadata" else int(tail.partition("-")[0])


def collection_assignment_id(task_uid: str, collection_id: int) -> str:
    return f"{task_uid}.{collection_id}"


def part_assignment_id(assignment_id: str, number: int, count: int) -> str:
    """Part `number`, from 1, of a collection assignment that is given out in `count` parts."""
    return f"{assignment_id}-{number}of{count}"


def part_of_assignment(assignment_id: str) -> tuple[int, int] | None:
    """Number, from 1, and count of a part; None for what is no part."""
    _, _, part = assignment_id.rpartition(".")[2].partition("-")
    number, _, count = part.partition("of")
    return (int(number), int(count)) if part else None


def metadata_assignment_id(task_uid: str) -> str:
    return f"{task_uid}.metadata"


class ObjectState(StrEnum):
    """State of a collection, partition or database in the source's metadata."""

    CREATED = "CREATED"
    DROPPED = "DROPPED"
    """Dropping or dropped: Milvus 2.3 keeps state 2 for minutes, then writes tombstones."""


class LoadKind(StrEnum):
    NONE = "NONE"
    COLLECTION = "COLLECTION"
    PARTITIONS = "PARTITIONS"


class Drift(StrEnum):
    """What to do about differences of the sink that the source did not cause."""

    REPAIR = "REPAIR"
    REPORT = "REPORT"


@dataclass(frozen=True, slots=True)
class Carry:
    """Kinds of operation that a task carries."""

    rows: bool = True
    schema: bool = True
    """Databases, collections, partitions, aliases, names, properties."""
    index: bool = True
    load: bool = True
    rbac: bool = False
    flush: bool = True


@dataclass(frozen=True, slots=True)
class Batching:
    """What a user wants of batches; what is None or 0 is as the sink has it."""

    max_rows: int = 0
    max_bytes: int = 0
    linger_ms: int | None = None


@dataclass(frozen=True, slots=True)
class RateLimits:
    """How much may be written, and by how many; 0 = no limit."""

    rows_per_second: int = 0
    bytes_per_second: int = 0
    requests_in_flight: int = 0
    """Writes of rows at once; openings of collections at once."""
    connections: int = 0
    connections_each: int = 1
    """That one process has to the sink; 1 also where `connections` is 0."""

    @property
    def replicators(self) -> int:
        """So many at most may hold something of the task; 0 = any number."""
        some = [self.requests_in_flight, self.connections // self.connections_each]
        return min((most for most in some if most), default=0)


@dataclass(frozen=True, slots=True)
class Database:
    database_id: int
    name: str
    state: ObjectState = ObjectState.CREATED
    properties: tuple[tuple[str, str], ...] = ()
    """Milvus 2.4 and later; sorted by key."""


@dataclass(frozen=True, slots=True)
class Partition:
    partition_id: int
    name: str
    create_ts: int
    state: ObjectState = ObjectState.CREATED
    drop_ts: int = 0
    """TSO at which the metadata shows the drop; 0 when not dropped or unknown."""


@dataclass(frozen=True, slots=True)
class Index:
    index_id: int
    name: str
    field_id: int
    field_name: str
    params: tuple[tuple[str, str], ...]
    """Index and type parameters as CreateIndex takes them, sorted by key."""
    create_ts: int


@dataclass(frozen=True, slots=True)
class Load:
    kind: LoadKind = LoadKind.NONE
    partition_ids: tuple[int, ...] = ()
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class Vchannel:
    """One shard's log and where it starts."""

    vchannel: str
    pchannel: str
    start_position: bytes
    """Position of the CreateCollection message."""


@dataclass(frozen=True, slots=True)
class Import:
    """A bulk import into a collection: its rows never pass through the log."""

    import_id: int
    rows: int
    """0 when the metadata does not say."""
    time_ms: int
    """Unix milliseconds of its start; 0 when unknown."""


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a collection, in the same database."""

    database_id: int
    database: str
    name: str
    collection_id: int
    alter_ts: int
    """TSO at which it came to stand for this collection; 0 when unknown."""


@dataclass(frozen=True, slots=True, order=True)
class RoleGrant:
    """A privilege of a role on objects of one kind; `object_name` is a name or `*`."""

    role: str
    object_type: str
    """`Collection`, `Global` or `User`, as Milvus spells them."""
    object_name: str
    database: str
    privilege: str
    """As Milvus' API spells it, for example `Insert`; also the name of a privilege group."""


@dataclass(frozen=True, slots=True)
class Rbac:
    """Who may do what. Passwords are stored as hashes only and are no part of it. Sorted."""

    users: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    """(user, role)."""
    grants: tuple[RoleGrant, ...] = ()
    privilege_groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(name, privileges); Milvus 2.5."""


@dataclass(frozen=True, slots=True)
class Collection:
    """A source collection as its metadata shows it; up to Milvus 2.5 the schema of an id never
    changes.
    """

    collection_id: int
    database_id: int
    database: str
    name: str
    schema: bytes
    """Serialized milvus.proto.schema.CollectionSchema, fields joined in, by field id, system fields
    included.
    """
    shards: int
    consistency_level: int
    create_ts: int
    properties: tuple[tuple[str, str], ...] = ()
    state: ObjectState = ObjectState.CREATED
    drop_ts: int = 0
    partitions: tuple[Partition, ...] = ()
    indexes: tuple[Index, ...] = ()
    load: Load = field(default_factory=Load)
    vchannels: tuple[Vchannel, ...] = ()
    alter_ts: int = 0
    """TSO of the newest change of the collection's own key (its name, its properties); 0 when
    unknown. It moves even where the value hides the change: 2.3.5 leaves changed properties out.
    """
    imports: tuple[Import, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.database}.{self.name}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything a source's metadata says, at one etcd revision."""

    cluster_id: int
    """etcd cluster id (ResponseHeader.cluster_id)."""
    revision: int
    tso: int
    """The source's saved TSO upper bound (`{root}/kv/gid/timestamp`); 0 when the key is absent."""
    databases: tuple[Database, ...]
    collections: tuple[Collection, ...]
    """Only collections in state Created, or Dropping while their keys are still there."""
    databases_keyed: bool = True
    """The source keeps a key for every database; False for the layout of Milvus 2.2."""
    incarnation: int = 0
    """Creation time of the default database in Unix nanoseconds: another one means that the
    source's metadata was made anew, even in the same etcd. 0 when unknown.
    """
    aliases: tuple[Alias, ...] = ()
    rbac: Rbac = field(default_factory=Rbac)
