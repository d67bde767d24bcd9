"""How far a program has come with a source, as text to keep.

Law: what it says is whole: every change at or below a vchannel's `resolved_ts` was handed out, none
beyond it was, and the first one that was not lies at or behind `read_from`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from milvus_cdc.catalog.guard import KnownSource
from milvus_cdc.errors import UserError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class VchannelPosition:
    """Of one shard's log."""

    pchannel: str
    read_from: bytes
    """Where to read from, inclusive; the queue's own, opaque."""
    resolved_ts: int
    """TSO; what is at or below it is left out."""
    incarnation: bytes = b""
    """Of the topic that `read_from` belongs to; empty = not known."""
    closed: bool = False
    """The log of this shard has ended."""


@dataclass(frozen=True, slots=True)
class CollectionPosition:
    """Of a collection, which is followed by its id; the names are those told last."""

    database: str
    name: str
    vchannels: Mapping[str, VchannelPosition]


@dataclass(frozen=True, slots=True)
class Positions:
    """Of everything that is followed. Keep it together with what was made of the changes."""

    collections: Mapping[int, CollectionPosition] = field(default_factory=dict)
    """By the source's collection id."""
    source: KnownSource | None = None
    """The source as last seen: in another one, these positions mean nothing."""

    def to_json(self) -> str:
        """One line of JSON; bytes as hexadecimal digits."""
        return orjson.dumps(
            {
                "format": FORMAT,
                "source": None if self.source is None else _source_out(self.source),
                "collections": {
                    str(collection_id): {
                        "database": each.database,
                        "name": each.name,
                        "vchannels": {
                            vchannel: {
                                "pchannel": at.pchannel,
                                "readFrom": at.read_from.hex(),
                                "resolvedTs": at.resolved_ts,
                                "incarnation": at.incarnation.hex(),
                                "closed": at.closed,
                            }
                            for vchannel, at in each.vchannels.items()
                        },
                    }
                    for collection_id, each in self.collections.items()
                },
            }
        ).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Positions:
        """Raises UserError POSITIONS_UNREADABLE for anything else than `to_json` writes."""
        try:
            whole = orjson.loads(text)
            if whole["format"] != FORMAT:
                raise ValueError(f"format {whole['format']!r}, this version reads {FORMAT}")
            return cls(
                {
                    int(collection_id): CollectionPosition(
                        each["database"],
                        each["name"],
                        {v: _vchannel_in(at) for v, at in each["vchannels"].items()},
                    )
                    for collection_id, each in whole["collections"].items()
                },
                None if whole["source"] is None else _source_in(whole["source"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                "POSITIONS_UNREADABLE",
                f"these are no positions that this version reads ({error!r}); take those that were "
                "saved before, or begin without any",
                field="positions",
            ) from error


def _vchannel_in(at: Mapping[str, Any]) -> VchannelPosition:
    return VchannelPosition(
        at["pchannel"],
        bytes.fromhex(at["readFrom"]),
        int(at["resolvedTs"]),
        bytes.fromhex(at["incarnation"]),
        bool(at["closed"]),
    )


def _source_out(source: KnownSource) -> dict[str, Any]:
    return {
        "clusterId": source.cluster_id,
        "revision": source.revision,
        "tso": source.tso,
        "databasesKeyed": source.databases_keyed,
        "incarnation": source.incarnation,
        "alive": sorted(source.alive),
    }


def _source_in(source: Mapping[str, Any]) -> KnownSource:
    return KnownSource(
        int(source["clusterId"]),
        int(source["revision"]),
        int(source["tso"]),
        bool(source["databasesKeyed"]),
        int(source["incarnation"]),
        frozenset(map(int, source["alive"])),
    )
