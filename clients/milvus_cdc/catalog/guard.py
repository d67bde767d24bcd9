"""Decides whether a catalogue's gaps are evidence that things were dropped; pure.

Law: absence counts only when the catalogue certainly comes from the source that was followed
before: same etcd cluster, a clock that did not go back, its sentinel keys there, and not more gone
at once without a trace than a limit. A wrong root path or a wiped etcd must never empty a sink.
"""

from __future__ import annotations

from collections.abc import Collection as Sized
from dataclasses import dataclass
from enum import StrEnum

from milvus_cdc.catalog.layout import DEFAULT_DATABASE_ID
from milvus_cdc.model import Catalogue, ObjectState

MASS_DROP_LIMIT = 3
"""So many collections may vanish unseen, for example while the controller was down."""


class Doubt(StrEnum):
    """Why a catalogue must not be acted upon."""

    SOURCE_IDENTITY_CHANGED = "SOURCE_IDENTITY_CHANGED"
    SOURCE_TSO_WENT_BACK = "SOURCE_TSO_WENT_BACK"
    SOURCE_METADATA_MISSING = "SOURCE_METADATA_MISSING"
    SOURCE_MASS_DROP = "SOURCE_MASS_DROP"


@dataclass(frozen=True, slots=True)
class KnownSource:
    """What the last trusted catalogue said about the source. Survives restarts; a new one is
    `learn`ed.
    """

    cluster_id: int
    revision: int
    tso: int
    databases_keyed: bool
    incarnation: int
    alive: frozenset[int]
    """Ids of followed collections that were last seen in state CREATED."""


@dataclass(frozen=True, slots=True)
class Objection:
    doubt: Doubt
    message: str
    vanished: frozenset[int] = frozenset()
    """Followed collections that are gone without having been seen as dropped."""


def judge(known: KnownSource | None, catalogue: Catalogue) -> Objection | None:
    """None: the catalogue may be acted upon. Without a known source it only needs the sentinels."""
    if known is not None and catalogue.cluster_id != known.cluster_id:
        return _other_source(
            f"etcd is cluster {catalogue.cluster_id:x}, it was {known.cluster_id:x}"
        )
    if known is not None and catalogue.revision < known.revision:
        return _other_source(
            f"etcd is at revision {catalogue.revision}, it was at {known.revision}"
        )
    missing = _missing_sentinel(known, catalogue)
    if missing:
        return Objection(
            Doubt.SOURCE_METADATA_MISSING,
            f"the source's etcd has no {missing}:"
            " check rootPath and metaSubPath, or restore its metadata",
        )
    if known is None:
        return None
    if known.incarnation and catalogue.incarnation != known.incarnation:
        return _other_source("metadata was made anew: its default database is another one")
    if catalogue.tso < known.tso:
        return Objection(
            Doubt.SOURCE_TSO_WENT_BACK,
            f"the source's clock went back from {known.tso} to {catalogue.tso}:"
            " its etcd was restored from a backup or made anew; make a new task",
        )
    vanished = known.alive - {each.collection_id for each in catalogue.collections}
    if len(vanished) > max(MASS_DROP_LIMIT, len(known.alive) / 2):
        return Objection(
            Doubt.SOURCE_MASS_DROP,
            f"{len(vanished)} of {len(known.alive)} followed collections are gone from the source's"
            " metadata without having been dropped in sight: confirm that they were dropped",
            vanished,
        )
    return None


def learn(catalogue: Catalogue, followed: Sized[int]) -> KnownSource:
    """What to remember of a catalogue that was trusted; `followed` are the collection ids a task
    follows.
    """
    return KnownSource(
        catalogue.cluster_id,
        catalogue.revision,
        catalogue.tso,
        catalogue.databases_keyed,
        catalogue.incarnation,
        frozenset(
            each.collection_id
            for each in catalogue.collections
            if each.state is ObjectState.CREATED and each.collection_id in followed
        ),
    )


def _other_source(what: str) -> Objection:
    return Objection(
        Doubt.SOURCE_IDENTITY_CHANGED,
        f"the source's {what}; point the task at the old source, or make a new task for this one",
    )


def _missing_sentinel(known: KnownSource | None, catalogue: Catalogue) -> str:
    if catalogue.tso == 0:
        return "timestamp key (kv/gid/timestamp, in 2.2 kv/tso/timestamp)"
    keyed = catalogue.databases_keyed or (known is not None and known.databases_keyed)
    present = catalogue.databases_keyed and any(
        each.database_id == DEFAULT_DATABASE_ID for each in catalogue.databases
    )
    if keyed and not present:
        return "key of the default database (root-coord/database/db-info/1)"
    return ""
