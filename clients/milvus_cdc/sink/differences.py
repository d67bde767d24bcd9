"""What a sink's collection lacks or has too much, from one look at it. Pure.

Laws: a name that any partition of the source has is never surplus, because its drop may still be on
its way in the log; a collection with a partition key has partitions of its own; of an index only
what both sides say is compared, because servers differ in what they show; a property that only the
sink has counts only where it is one that users set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from milvus_cdc.model import Carry, Collection, Index, LoadKind, ObjectState

DEFAULT_PARTITION = "_default"
DESCRIPTION = "collection.description"
TYPE_PARAMS = frozenset({"dim", "max_length", "max_capacity"})
MMAP = "mmap.enabled"
_NOT_COMPARED = TYPE_PARAMS | {"params", MMAP}
_CASELESS = ("index_type", "metric_type")

OMITTED_PROPERTIES = frozenset({"replicate.id", "replicate.endTS"})
"""The source's own replication marks: they would make the sink refuse ordinary writes."""
_USER_PROPERTIES = ("collection.", MMAP, "partitionkey.", "lazyload.", "dynamicfield.")
NEUTRAL = {"collection.ttl.seconds": "0", MMAP: "false"}
"""What is as good as a missing property, for servers that cannot delete one (before 2.5)."""


class Action(StrEnum):
    """What repairing would do."""

    CREATE = "CREATE"
    ALTER = "ALTER"
    DROP = "DROP"


@dataclass(frozen=True, slots=True)
class ObjectDifference:
    """One object of the sink that is not as the source has it."""

    action: Action
    kind: str
    """`database`, `collection`, `partition`, `index`, `load`, `property`, ..."""
    database: str
    """At the sink, like `collection`; empty for what belongs to none."""
    collection: str
    name: str
    detail: str
    """For people: what is there and what is wanted."""

    @property
    def place(self) -> tuple[str, str]:
        """Which object of its collection."""
        return self.kind, self.name

    @property
    def text(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"{self.kind}{name}: {self.detail}"


@dataclass(frozen=True, slots=True)
class SeenIndex:
    name: str
    field_name: str
    params: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Seen:
    """A sink's collection as one look shows it."""

    name: str
    """Another than wanted when somebody renamed it."""
    partitions: tuple[str, ...]
    indexes: Mapping[str, SeenIndex]
    loaded: frozenset[str]
    """Partitions that are loaded or being loaded."""
    properties: Mapping[str, str]
    replicas: int | None = None
    """None where it was not asked for."""
    description: str | None = None
    """None where it cannot be changed."""
    index_mmap: bool = False
    """This server shows and changes whether an index is mapped into memory."""


def missing(want: Collection, why: str) -> ObjectDifference:
    return ObjectDifference(Action.CREATE, "collection", want.database, want.name, "", why)


def database_difference(action: Action, name: str, detail: str) -> ObjectDifference:
    return ObjectDifference(action, "database", name, "", name, detail)


def is_missing(difference: ObjectDifference) -> bool:
    """The collection itself is not there: nothing mends that but filling it anew."""
    return difference.kind == "collection" and difference.action is Action.CREATE


def compare(
    want: Collection, seen: Seen, carry: Carry, *, partition_key: bool, description: str = ""
) -> tuple[ObjectDifference, ...]:
    """In the order in which they are to be mended."""
    found: list[ObjectDifference] = []

    def add(action: Action, kind: str, name: str, detail: str) -> None:
        found.append(ObjectDifference(action, kind, want.database, want.name, name, detail))

    if carry.schema:
        if seen.name != want.name:
            add(Action.ALTER, "collection", seen.name, f"is to be called {want.name}")
        for action, name, detail in _properties(want, seen, description):
            add(action, "property", name, detail)
        if not partition_key:
            for action, name, detail in _partitions(want, seen):
                add(action, "partition", name, detail)
    if carry.index:
        for action, name, detail in _indexes(want, seen):
            add(action, "index", name, detail)
    if carry.load:
        for action, detail in _load(want, seen):
            add(action, "load", "", detail)
    return tuple(found)


_Named = Iterator[tuple[Action, str, str]]


def wanted_properties(want: Collection) -> dict[str, str]:
    return {key: value for key, value in want.properties if key not in OMITTED_PROPERTIES}


def _properties(want: Collection, seen: Seen, description: str) -> _Named:
    wanted = wanted_properties(want)
    for key, value in wanted.items():
        there = seen.properties.get(key)
        if there is None:
            if NEUTRAL.get(key) != value:
                yield Action.CREATE, key, f"is unset, wanted is {value!r}"
        elif there != value:
            yield Action.ALTER, key, f"is {there!r}, wanted is {value!r}"
    for key in sorted(seen.properties.keys() - wanted.keys() - OMITTED_PROPERTIES):
        there = seen.properties[key]
        if key.startswith(_USER_PROPERTIES) and NEUTRAL.get(key) != there:
            yield Action.DROP, key, f"is {there!r}, the source does not set it"
    if seen.description is not None and seen.description != description:
        yield Action.ALTER, DESCRIPTION, f"is {seen.description!r}, wanted is {description!r}"


def _partitions(want: Collection, seen: Seen) -> _Named:
    alive = [p.name for p in want.partitions if p.state is ObjectState.CREATED]
    named = {p.name for p in want.partitions} | {DEFAULT_PARTITION}
    for name in alive:
        if name not in seen.partitions:
            yield Action.CREATE, name, "is missing"
    for name in seen.partitions:
        if name not in named:
            yield Action.DROP, name, "the source has none of that name"


def _indexes(want: Collection, seen: Seen) -> _Named:
    wanted = {index.name: index for index in want.indexes}
    for name, there in seen.indexes.items():
        if name not in wanted:
            yield Action.DROP, name, f"of field {there.field_name!r}: the source has no such index"
    for name, index in wanted.items():
        found = seen.indexes.get(name)
        if found is None:
            yield Action.CREATE, name, f"of field {index.field_name!r}: is missing"
            continue
        differing = index_differs(index, found)
        if not differing and seen.index_mmap:
            differing = mmap_differs(index, found)
        if differing:
            yield Action.ALTER, name, f"of field {index.field_name!r}: {differing}"


def index_differs(wanted: Index, found: SeenIndex) -> str:
    """What must be built anew; empty when it is this index."""
    if wanted.field_name != found.field_name:
        return f"is on field {found.field_name!r}"
    ours, theirs = _flat(dict(wanted.params)), _flat(found.params)
    return ", ".join(
        f"{key} is {theirs[key]!r}, wanted is {ours[key]!r}"
        for key in sorted(ours.keys() & theirs.keys())
        if ours[key] != theirs[key]
    )


def mmap_differs(wanted: Index, found: SeenIndex) -> str:
    ours = dict(wanted.params).get(MMAP, "")
    theirs = found.params.get(MMAP, "")
    if ours.lower() == theirs.lower() or {ours.lower(), theirs.lower()} <= {"", "false"}:
        return ""
    return f"{MMAP} is {theirs or 'unset'}, wanted is {ours or 'unset'}"


def _load(want: Collection, seen: Seen) -> Iterator[tuple[Action, str]]:
    there = set(seen.partitions)
    match want.load.kind:
        case LoadKind.NONE:
            if seen.loaded:
                yield Action.DROP, "is loaded, at the source it is not"
            return
        case LoadKind.COLLECTION:
            wanted = there
        case LoadKind.PARTITIONS:
            wanted = loaded_partitions(want) & there
            if not wanted:
                # Their names have not arrived yet: no reason to release what serves.
                return
    if not seen.loaded:
        yield Action.CREATE, "is not loaded, at the source it is"
        return
    if lacking := sorted(wanted - seen.loaded):
        yield Action.ALTER, f"these partitions are not loaded: {_some(lacking)}"
    elif surplus := sorted(seen.loaded & there - wanted):
        yield Action.ALTER, f"these partitions are loaded and should not be: {_some(surplus)}"
    elif seen.replicas is not None and seen.replicas < want.load.replicas:
        yield Action.ALTER, f"has {seen.replicas} replicas, wanted are {want.load.replicas}"


def loaded_partitions(want: Collection) -> set[str]:
    """Names of the partitions that the source has loaded, where it loads single ones."""
    return {
        partition.name
        for partition in want.partitions
        if partition.state is ObjectState.CREATED
        and partition.partition_id in want.load.partition_ids
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _flat(params: Mapping[str, str]) -> dict[str, str]:
    """Build parameters beside the others, wherever a version keeps them: flat, or in `params`."""
    flat = {key: value for key, value in params.items() if key not in _NOT_COMPARED}
    try:
        nested = json.loads(params.get("params") or "{}")
    except ValueError:
        nested = {}
    if isinstance(nested, dict):
        flat.update((key, _text(value)) for key, value in nested.items())
    for key in _CASELESS:
        if key in flat:
            flat[key] = flat[key].upper()
    return flat


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
