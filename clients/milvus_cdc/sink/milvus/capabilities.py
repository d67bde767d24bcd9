"""What a Milvus can hold and do, asked of it: its version first, then what it answers.

Law: what a server lacks is known before anything is made there; a server nobody has heard of is
taken for a complete one, so that it refuses in its own words.

Facts, seen on Milvus 2.2.16 and 2.3.5, milvus-lite 2.5.1 (a C++ program) and 3.2.2 (Python):
- 2.2.16 has databases and partition keys, but no Upsert and no `count(*)`: a collection with
  dynamic fields answers such a query with rows. It leaves `nullable` out silently, as does 2.3.5.
- 2.3.5 creates collections with field types that it does not know (bfloat16, sparse, int8
  vectors).
- milvus-lite 2.5.1 does not know GetVersion, partitions, databases or aliases. It takes no notice
  of the names of partitions and databases in requests: all rows end up in one collection.
  Everything is always loaded. AllocTimestamp gives 0. Of a collection with a partition key nothing
  can be deleted. An upsert or delete of a text key with a single quote fails (it ends up in SQL),
  the delete of one with a control character succeeds and removes nothing.
- milvus-lite 3.2.2 does not know AllocTimestamp, GetReplicas; it has one index a field, named as
  the field; its expressions have no arithmetic; its queries are in key order only with the
  parameter `iterator`; `count(*)` without an expression counts all partitions; parallel writes to
  one collection are not safe (its own words); a second row of a key replaces the first. Its Upsert
  leaves what the new row does not have of the old one: dynamic fields would outlive their row.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import CdcError, UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2, schema_pb2
from milvus_cdc.model import Collection, Index, LoadKind, ObjectState
from milvus_cdc.sink.milvus import schema as schemas

DEFAULT_PARTITION = "_default"

_T = schema_pb2.DataType
_SCALARS = frozenset({_T.Bool, _T.Int8, _T.Int16, _T.Int32, _T.Int64, _T.Float, _T.Double})
_EVERY_TYPE = frozenset(_T.values())
_2_2_TYPES = _SCALARS | {_T.VarChar, _T.JSON, _T.FloatVector, _T.BinaryVector}
_2_4_TYPES = _2_2_TYPES | {_T.Array, _T.Float16Vector, _T.BFloat16Vector} | {_T.SparseFloatVector}
_KIND_OF_TYPE = {
    _T.FloatVector: "float vectors",
    _T.Float16Vector: "16-bit vectors",
    _T.BFloat16Vector: "16-bit vectors",
    _T.BinaryVector: "binary vectors",
    _T.SparseFloatVector: "sparse vectors",
    _T.VarChar: "text",
    _T.JSON: "JSON",
    _T.Array: "arrays",
} | dict.fromkeys(_SCALARS, "numbers")
_ANY_INDEX: Mapping[str, frozenset[str]] = MappingProxyType({})
_2_2_FLOAT_INDEXES = frozenset(
    {"FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "HNSW", "DISKANN", "ANNOY", "AUTOINDEX"}
    | {"RHNSW_FLAT", "RHNSW_SQ", "RHNSW_PQ"}
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The defaults are those of a complete Milvus (2.5)."""

    name: str
    """For people, for example `Milvus v2.3.5` or `milvus-lite 2`."""
    version: str
    """As the server tells it; empty when it does not."""
    databases: bool = True
    partitions: bool = True
    aliases: bool = True
    rename: bool = True
    rbac: bool = True
    properties: bool = True
    """AlterCollection changes them."""
    upsert: bool = True
    """Upsert puts a whole row in the place of another."""
    count: bool = True
    """`count(*)` counts rows."""
    load: bool = True
    """Collections are loaded and released; False: always loaded."""
    load_partitions: bool = True
    """Single partitions, too; False: always all of a collection."""
    replicas: bool = True
    index_names: bool = True
    timestamps: bool = True
    """AllocTimestamp gives the server's time."""
    serial_writes: bool = False
    """One write at a time to a collection."""
    constant_sums: bool = True
    """`-9223372036854775807 - 1` is a key in an expression; False: the number itself is."""
    ordered_by: str = ""
    """Query parameter that puts rows in key order; empty where they always are."""
    field_types: frozenset[int] = _EVERY_TYPE
    vector_fields: int = 0
    """Most vector fields of a collection; 0 = no limit known."""
    nullable: bool = True
    default_values: bool = True
    functions: bool = True
    partition_keys: bool = True
    unsafe_in_keys: str = ""
    """Regular expression for characters of text keys that cannot be deleted."""
    cosine: bool = True
    index_types: Mapping[str, frozenset[str]] = field(default_factory=lambda: _ANY_INDEX)
    """By kind of field; a kind that is missing takes any."""

    @property
    def release(self) -> tuple[int, int]:
        """Of Milvus itself; (0, 0) for a server that counts otherwise."""
        numbers = re.match(r"v?(\d+)\.(\d+)", self.version)
        return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)

    def loadable(self, want: Collection) -> Collection:
        """With a load state that the server can have: a collection of which the source serves some
        partitions is served whole.
        """
        if self.load_partitions or want.load.kind is not LoadKind.PARTITIONS:
            return want
        return replace(want, load=replace(want.load, kind=LoadKind.COLLECTION, partition_ids=()))

    # ---- what it cannot hold

    def violations(self, want: Collection, *, indexes: bool = True) -> list[str]:
        """What of this collection the server cannot hold, each naming the object; empty: nothing.

        Raises BugError when the schema has no key.
        """
        found = []
        if not self.databases and want.database not in ("", "default"):
            found.append(
                f"database {want.database!r}: {self.name} has one namespace only; map it to "
                f"default with a rename rule ({want.database}.* -> default.{want.database}_*)"
            )
        schema = schemas.parse(want)
        found += self._schema_violations(schema)
        if not self.partitions and not schemas.has_partition_key(schema):
            found += [
                f"partition {each.name!r}: {self.name} has no partitions"
                for each in want.partitions
                if each.state is ObjectState.CREATED and each.name != DEFAULT_PARTITION
            ]
        if indexes:
            types = {each.fieldID: each.data_type for each in schema.fields}
            found += filter(
                None, (self.index_violation(i, types.get(i.field_id, 0)) for i in want.indexes)
            )
        return found

    def _schema_violations(self, schema: Any) -> list[str]:
        found = []
        fields = schemas.user_fields(schema)
        for each in fields:
            what = f"field {each.name!r}"
            if each.data_type not in self.field_types:
                found.append(f"{what}: {self.name} has no type {type_name(each.data_type)}")
            if each.nullable and not self.nullable:
                found.append(f"{what}: {self.name} has no nullable fields")
            if each.HasField("default_value") and not self.default_values:
                found.append(f"{what}: {self.name} has no default values")
        vectors = [each.name for each in fields if each.data_type >= _T.BinaryVector]
        if self.vector_fields and len(vectors) > self.vector_fields:
            found.append(
                f"fields {', '.join(map(repr, vectors))}: {self.name} takes "
                f"{self.vector_fields} vector field in a collection"
            )
        keyed = [each.name for each in fields if each.is_partition_key]
        if keyed and not self.partition_keys:
            found.append(
                f"field {keyed[0]!r}: {self.name} deletes nothing where there is a partition key"
            )
        if schema.functions and not self.functions:
            found.append(f"function {schema.functions[0].name!r}: {self.name} has no functions")
        return found

    def index_violation(self, index: Index, data_type: int) -> str | None:
        """Why the server cannot hold this index, naming it."""
        params = {key: value.upper() for key, value in index.params}
        kind = _KIND_OF_TYPE.get(data_type, "")
        wanted, types = params.get("index_type", ""), self.index_types.get(kind)
        what = f"index {index.name!r} on field {index.field_name!r}"
        if types is not None and wanted not in types:
            names = ", ".join(sorted(filter(None, types))) or "no index"
            return f"{what}: {self.name} has no {wanted or 'default'} index for {kind} ({names})"
        if params.get("metric_type") == "COSINE" and not self.cosine:
            return f"{what}: {self.name} does not know the metric COSINE"
        return None

    def check_keys(self, collection: str, keys: Keys) -> None:
        """Raises UserError UNSUPPORTED_BY_SINK for a key whose row could not be removed again."""
        if not self.unsafe_in_keys or not isinstance(keys, tuple):
            return
        unsafe = re.compile(self.unsafe_in_keys)
        for key in keys:
            if unsafe.search(key):
                raise UserError(
                    "UNSUPPORTED_BY_SINK",
                    f"{collection} has the key {key!r}, whose row {self.name} could not replace or "
                    "delete (single quotes, control characters); exclude the collection or give it "
                    "other keys",
                    field="selection.exclude",
                )

    def check(self, want: Collection) -> None:
        """Raises UserError UNSUPPORTED_BY_SINK; indexes aside, which hold no rows."""
        if found := self.violations(want, indexes=False):
            raise unsupported(want, found)


def unsupported(want: Collection, found: list[str]) -> UserError:
    return UserError(
        "UNSUPPORTED_BY_SINK",
        f"the sink cannot hold collection {want.full_name}: {'; '.join(found)}",
        field="selection.exclude",
    )


def type_name(number: int) -> str:
    known = _T.values()
    return str(_T.Name(number)) if number in known else f"{number}"


# What is known of each generation.

_LITE_2 = Capabilities(
    name="milvus-lite 2",
    version="",
    databases=False,
    partitions=False,
    aliases=False,
    rename=False,
    rbac=False,
    properties=False,
    load=False,
    replicas=False,
    timestamps=False,
    field_types=_2_4_TYPES,
    nullable=False,
    functions=False,
    partition_keys=False,
    unsafe_in_keys=r"[\x00-\x1f']",
    index_types=MappingProxyType(
        {
            "float vectors": frozenset({"FLAT", "IVF_FLAT", "AUTOINDEX"}),
            "16-bit vectors": frozenset({"FLAT"}),
            "binary vectors": frozenset({"BIN_FLAT"}),
            "sparse vectors": frozenset({"SPARSE_INVERTED_INDEX", "SPARSE_WAND"}),
            "numbers": frozenset({"INVERTED"}),
            "text": frozenset({"", "INVERTED", "TRIE"}),
        }
    ),
)
_LITE_3 = Capabilities(
    name="milvus-lite",
    version="",
    rbac=False,
    upsert=False,
    load_partitions=False,
    replicas=False,
    index_names=False,
    timestamps=False,
    serial_writes=True,
    constant_sums=False,
    ordered_by="iterator",
    field_types=_SCALARS | {_T.VarChar, _T.JSON, _T.Array, _T.FloatVector, _T.SparseFloatVector},
    index_types=MappingProxyType(
        {
            "sparse vectors": frozenset({"SPARSE_INVERTED_INDEX"}),
            "numbers": frozenset({"INVERTED"}),
            "text": frozenset({"INVERTED"}),
        }
    ),
)
_SCALAR_INDEXES_TO_2_3 = {
    "numbers": frozenset({"", "STL_SORT"}),
    "text": frozenset({"", "TRIE"}),
}


def by_version(version: str) -> Capabilities:
    """What is known of a server that calls itself so (GetVersion's answer)."""
    if lite := re.match(r"milvus[_-]lite-(\d+\..*)", version):
        return replace(_LITE_3, name=f"milvus-lite {lite[1]}", version=version)
    whole = Capabilities(f"Milvus {version}".rstrip(), version)
    release = whole.release
    if (0, 0) < release <= (2, 2):
        return replace(
            whole,
            upsert=False,
            count=False,
            field_types=_2_2_TYPES,
            vector_fields=1,
            nullable=False,
            default_values=False,
            functions=False,
            cosine=False,
            index_types=MappingProxyType(
                {
                    **_SCALAR_INDEXES_TO_2_3,
                    "float vectors": _2_2_FLOAT_INDEXES,
                    "binary vectors": frozenset({"BIN_FLAT", "BIN_IVF_FLAT"}),
                }
            ),
        )
    if release == (2, 3):
        return replace(
            whole,
            field_types=_2_2_TYPES | {_T.Array, _T.Float16Vector},
            vector_fields=1,
            nullable=False,
            default_values=False,
            functions=False,
            index_types=MappingProxyType(_SCALAR_INDEXES_TO_2_3),
        )
    if release == (2, 4):
        return replace(
            whole, field_types=_2_4_TYPES, nullable=False, default_values=False, functions=False
        )
    if release == (2, 5):
        return replace(whole, field_types=_2_4_TYPES)
    return whole


async def ask(client: MilvusClient) -> Capabilities:
    """What this server is. Raises as MilvusClient.call does when it cannot be asked."""
    try:
        answer = await client.ask("GetVersion", milvus_pb2.GetVersionRequest())
    except Refusal as refusal:
        raise client.error(refusal) from refusal
    except CdcError as error:
        if not _unknown_method(error):
            raise
        # Only the first generation of milvus-lite has no version; it is what answers to Connect.
        await client.call("Connect", milvus_pb2.ConnectRequest())
        return _LITE_2
    known = by_version(str(answer.version))
    if (2, 3) <= known.release <= (2, 6):
        return known
    # One that nobody has heard of, or that calls itself one thing and lacks another (databases came
    # with 2.2.9), is believed in what it lacks.
    asked = {
        "upsert": ("Upsert", milvus_pb2.UpsertRequest()),
        "databases": ("ListDatabases", milvus_pb2.ListDatabasesRequest()),
        "partitions": ("ShowPartitions", milvus_pb2.ShowPartitionsRequest()),
        "timestamps": ("AllocTimestamp", milvus_pb2.AllocTimestampRequest()),
        "replicas": ("GetReplicas", milvus_pb2.GetReplicasRequest()),
        "rename": ("RenameCollection", milvus_pb2.RenameCollectionRequest()),
        "aliases": ("DropAlias", milvus_pb2.DropAliasRequest()),
    }
    wanted = [name for name in asked if getattr(known, name)]
    there = await asyncio.gather(*(_knows(client, *asked[name]) for name in wanted))
    missing: dict[str, Any] = {
        name: False for name, known_there in zip(wanted, there, strict=True) if not known_there
    }
    return replace(known, **missing) if missing else known


async def _knows(client: MilvusClient, method: str, request: Any) -> bool:
    """Asked about nothing at all (empty names), so that only the method itself can succeed."""
    try:
        await client.ask(method, request)
    except Refusal:
        return True
    except CdcError as error:
        if _unknown_method(error):
            return False
        if isinstance(error, UserError):
            return True  # it knows the method and minds the user
        raise
    return True


def _unknown_method(error: CdcError) -> bool:
    return isinstance(error, UserError) and error.reason.endswith("_UNSUPPORTED")
