"""What a task wants at its sink beside collections: databases, aliases, roles, and what it reads
from the operations channel.

Laws: level-triggered, from a trusted reading and the records alone. An alias is wanted only when
every row older than it is in the sink under the name it is to stand for, and no collection has its
own name there; until then it stays as it was. What was ever wanted and is gone at the source is
named as dropped until a replicator says that it is. What leaves the selection stays at the sink.
A new version tells the replicator; what a confirmation ends does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from milvus_cdc.model import Alias, Catalogue, Rbac, RoleGrant

from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.mapping import Rules, sink_database, sink_name
from milvus_cdc_controller.core.task import AliasWish, MetadataRecord, Properties, TaskRecord

T = TypeVar("T")

_DML_TOPIC = re.compile(r"(?P<cluster>.+)-rootcoord-dml_\d+")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the wishes follow from."""

    task: TaskRecord
    records: Mapping[int, CollectionRecord]
    progress: Callable[[CollectionRecord], CollectionProgress]
    catalogue: Catalogue
    taken: Callable[[str], bool]
    """Whether somebody else holds this name at the sink."""


@dataclass(frozen=True, slots=True)
class Wanted:
    metadata: MetadataRecord
    awaited: dict[int, int]
    """Collections whose progress may let an alias come, and the TSO it waits for."""


def wanted_metadata(metadata: MetadataRecord, facts: Facts) -> Wanted:
    """The record as it should be now; its version has grown when the replicator must hear of it."""
    task = facts.task
    aliases, awaited = _aliases(metadata, facts)
    old = {wish.source: wish for wish in metadata.aliases}
    new = {wish.source: wish for wish in aliases}
    moved = {
        wish.collection_id
        for source, wish in old.items()
        if source not in new or new[source].collection_id != wish.collection_id
    }
    places = {(wish.database, wish.alias) for wish in aliases}
    gone = {
        (wish.database, wish.alias): wish.collection_id
        for source, wish in old.items()
        if (wish.database, wish.alias) not in places and not _left(wish, facts)
    }
    if not metadata.aliases_done and task.spec.carry.schema:
        gone |= {
            (database, alias): collection_id
            for database, alias, collection_id in metadata.dropped_aliases
            if (database, alias) not in places
        }
    leaving = moved | (set() if metadata.aliases_done else set(metadata.leaving))
    rbac, dropped_rbac = _rbac(metadata, facts)
    changed = replace(
        metadata,
        aliases=aliases,
        dropped_aliases=tuple(sorted((*place, number) for place, number in gone.items())),
        leaving=tuple(sorted(leaving)),
        rbac=rbac,
        dropped_rbac=dropped_rbac,
        operations_channel=_operations_channel(metadata, facts),
        database_properties=_properties(metadata, facts),
    )
    if _says_more(metadata, changed):
        changed = replace(changed, version=metadata.version + 1)
    return Wanted(changed, awaited)


def _says_more(old: MetadataRecord, new: MetadataRecord) -> bool:
    return (
        (new.aliases, new.rbac, new.operations_channel, new.database_properties)
        != (old.aliases, old.rbac, old.operations_channel, old.database_properties)
        or bool(set(new.dropped_aliases) - set(old.dropped_aliases))
        or _minus(new.dropped_rbac, old.dropped_rbac) != Rbac()
    )


# Databases.


def _properties(metadata: MetadataRecord, facts: Facts) -> tuple[Properties, ...]:
    """Of the source's databases that have some, by their names at the sink."""
    names = {wish.database_id: wish.name for wish in metadata.databases if not wish.dropped}
    return tuple(
        (names[database.database_id], database.properties)
        for database in facts.catalogue.databases
        if database.properties and database.database_id in names
    )


# Aliases.


def _aliases(
    metadata: MetadataRecord, facts: Facts
) -> tuple[tuple[AliasWish, ...], dict[int, int]]:
    if not facts.task.spec.carry.schema:
        return (), {}
    old = {wish.source: wish for wish in metadata.aliases}
    wanted: dict[str, AliasWish] = {}
    awaited: dict[int, int] = {}
    for alias in facts.catalogue.aliases:
        record = facts.records.get(alias.collection_id)
        if record is None or record.deselected or record.dropping:
            continue
        source = f"{alias.database}.{alias.name}"
        before = old.get(source)
        fresh = _wish(facts.task.spec.rename, alias, record)
        stays = before is not None and _same_place(before, fresh)
        if stays and at_sink(record):
            wanted[source] = fresh
        elif stays:
            assert before is not None
            wanted[source] = before
        elif _ready(alias, fresh, record, facts):
            wanted[source] = fresh
        else:
            before_ts = awaited.get(alias.collection_id, 0)
            awaited[alias.collection_id] = max(alias.alter_ts, before_ts)
            if before is not None:
                # It goes on standing for what it stood for: never a moment without it.
                wanted[source] = _as_named_now(before, facts)
    return tuple(wanted[source] for source in sorted(wanted)), awaited


def _wish(rules: Rules, alias: Alias, record: CollectionRecord) -> AliasWish:
    """It lives in the database of its collection; a rule that matches it gives its own name."""
    name = sink_name(rules, f"{alias.database}.{alias.name}").partition(".")[2]
    return AliasWish(
        f"{alias.database}.{alias.name}",
        record.want.database,
        name,
        record.want.name,
        record.collection_id,
        record.sink_collection_id,
    )


def _same_place(one: AliasWish, other: AliasWish) -> bool:
    return (one.database, one.alias, one.collection_id) == (
        other.database,
        other.alias,
        other.collection_id,
    )


def at_sink(record: CollectionRecord) -> bool:
    """It is there, and surely under the name that it is wanted to have."""
    return record.opened and not record.renaming


def _ready(alias: Alias, wish: AliasWish, record: CollectionRecord, facts: Facts) -> bool:
    return (
        at_sink(record)
        and facts.progress(record).resolved_ts >= alias.alter_ts
        and not facts.taken(wish.place)
    )


def _as_named_now(wish: AliasWish, facts: Facts) -> AliasWish:
    """A rename takes the alias along."""
    record = facts.records.get(wish.collection_id)
    if record is None or not at_sink(record) or record.want.database != wish.database:
        return wish
    return replace(wish, collection=record.want.name)


def _left(wish: AliasWish, facts: Facts) -> bool:
    """Still the same at the source, and the task does not follow it any more."""
    if not facts.task.spec.carry.schema:
        return True
    record = facts.records.get(wish.collection_id)
    if record is not None and not record.deselected:
        return False
    return any(
        f"{alias.database}.{alias.name}" == wish.source
        and alias.collection_id == wish.collection_id
        for alias in facts.catalogue.aliases
    )


def holds_back_drop(metadata: MetadataRecord, collection_id: int) -> bool:
    """An alias of ours stands for it at the sink, or may."""
    if any(wish.collection_id == collection_id for wish in metadata.aliases):
        return True
    return not metadata.aliases_done and collection_id in metadata.leaving


def alias_names(metadata: MetadataRecord) -> frozenset[str]:
    """`database.alias` of every alias that is at the sink, or may be."""
    found = {wish.place for wish in metadata.aliases}
    if not metadata.aliases_done:
        found.update(f"{database}.{name}" for database, name, _ in metadata.dropped_aliases)
    return frozenset(found)


# Roles.


def _rbac(metadata: MetadataRecord, facts: Facts) -> tuple[Rbac | None, Rbac]:
    """What should be, and what was given by us and should not be any more."""
    if not facts.task.spec.carry.rbac:
        return None, Rbac()
    wanted = mapped_rbac(facts.task, facts.catalogue.rbac)
    before = metadata.rbac or Rbac()
    if metadata.applied_version < metadata.version:
        before = _plus(before, metadata.dropped_rbac)
    return wanted, replace(_minus(before, wanted), users=())


def mapped_rbac(task: TaskRecord, rbac: Rbac) -> Rbac:
    """With the names of the sink. A grant on a collection, or on all of a database, that the task
    cannot follow is left out: at the sink that name may be somebody else's.
    """
    grants = (_mapped_grant(task, grant) for grant in rbac.grants)
    return replace(rbac, grants=tuple(sorted({grant for grant in grants if grant is not None})))


def _mapped_grant(task: TaskRecord, grant: RoleGrant) -> RoleGrant | None:
    rules, selection = task.spec.rename, task.spec.selection
    if grant.database == "*":
        return grant
    if grant.object_type != "Collection" or grant.object_name == "*":
        if grant.object_type == "Collection" and not selection.selects_database(grant.database):
            return None
        return replace(grant, database=sink_database(rules, grant.database))
    full_name = f"{grant.database}.{grant.object_name}"
    if not selection.selects(full_name):
        return None
    database, _, name = sink_name(rules, full_name).partition(".")
    return replace(grant, database=database, object_name=name)


def _minus(one: Rbac, other: Rbac) -> Rbac:
    groups = {name for name, _ in other.privilege_groups}
    return Rbac(
        users=_without(one.users, other.users),
        roles=_without(one.roles, other.roles),
        members=_without(one.members, other.members),
        grants=_without(one.grants, other.grants),
        privilege_groups=tuple(each for each in one.privilege_groups if each[0] not in groups),
    )


def _plus(one: Rbac, other: Rbac) -> Rbac:
    return Rbac(
        users=_with(one.users, other.users),
        roles=_with(one.roles, other.roles),
        members=_with(one.members, other.members),
        grants=_with(one.grants, other.grants),
        privilege_groups=tuple(
            sorted((dict(other.privilege_groups) | dict(one.privilege_groups)).items())
        ),
    )


def _without(one: tuple[T, ...], other: tuple[T, ...]) -> tuple[T, ...]:
    gone = set(other)
    return tuple(each for each in one if each not in gone)


def _with(one: tuple[T, ...], other: tuple[T, ...]) -> tuple[T, ...]:
    return (*one, *_without(other, one))


# The operations channel.


def _operations_channel(metadata: MetadataRecord, facts: Facts) -> str:
    """`{cluster}-replicate-msg` (Milvus 2.3.2 to 2.5); empty when nothing is wanted from it, or
    when the source's topics have names of their own.
    """
    if not (facts.task.spec.carry.flush or facts.task.spec.carry.rbac):
        return ""
    for collection in facts.catalogue.collections:
        for vchannel in collection.vchannels:
            topic = _DML_TOPIC.fullmatch(vchannel.pchannel)
            if topic is not None:
                return f"{topic['cluster']}-replicate-msg"
    return metadata.operations_channel


def flushed_collections(
    records: Iterable[CollectionRecord],
    aliases: Iterable[Alias],
    database: str,
    names: Iterable[str],
) -> frozenset[int]:
    """Ids of the collections that a flush names, by name or alias."""
    wanted = {f"{database or 'default'}.{name}" for name in names}
    by_alias = {
        alias.collection_id for alias in aliases if f"{alias.database}.{alias.name}" in wanted
    }
    return frozenset(
        record.collection_id
        for record in records
        if record.source_name in wanted or record.collection_id in by_alias
    )
