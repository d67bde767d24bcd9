"""A manifest: what one commit added to a collection's files, and all that holds after it. Pure.

Laws: a manifest is the commit point: a file with rows that none names is not published. Numbers
follow each other without a gap, whoever writes them; each carries its owner's epoch, which goes
down only when another task takes the files over. All that a new owner needs stands in the newest
one; the files are in all of them. Unknown fields are left aside, a higher `format` is refused.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from milvus_cdc.errors import UserError
from milvus_cdc.rows import Table
from milvus_cdc.sink.writer import Checkpoint

FORMAT = 1

OPEN = "OPEN"
"""A new owner; from here on its predecessors cannot commit."""
WRITE = "WRITE"
SCHEMA = "SCHEMA"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A published file; `path` is relative to the collection's folder."""

    path: str
    rows: int
    deletes: int
    """How many of the rows are deletes."""
    bytes: int
    min_ts: int
    max_ts: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Event:
    """A schema change: after all rows of earlier manifests, before those of later ones."""

    kind: str
    """`milvus_cdc.sink.writer.SchemaChangeKind`."""
    ts: int
    """TSO; where the source did not say it, that of the newest change before it."""
    partition: str = ""
    database: str = ""
    collection: str = ""
    """New names."""


@dataclass(frozen=True, slots=True)
class Shard:
    """How far a vchannel is published."""

    read_from: str
    """Base64; empty while it has no checkpoint."""
    resolved_ts: int
    written_ts: int = 0
    """Newest change in the files."""
    written: tuple[str, ...] = ()
    """Changes in the files that lie beyond `resolved_ts`: `{ts}.{order}`, of a delete with `-`."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the module; fields from `generation` on describe the state after the commit."""

    number: int
    epoch: int
    writer: str
    """Another one for each opening by a process."""
    attempt: str
    kind: str
    time_ms: int
    """Unix milliseconds of the commit by the writer's clock."""
    collection_id: int
    task: str
    task_uid: str
    source_database: str
    source_collection: str
    generation: int
    generation_from: int
    """Number of the generation's first manifest."""
    database: str
    collection: str
    schema: str
    """Hash of the schema in force, see `schema_file`."""
    dropped: bool = False
    partitions: tuple[str, ...] = ()
    """Named ones that are there."""
    dropped_partitions: tuple[str, ...] = ()
    rows: int = 0
    """Of the generation, deletes included."""
    told_ts: int = 0
    """The owner was told that every change at or below it is published: time passes where no rows
    come.
    """
    shards: dict[str, Shard] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    """Added by this commit."""
    events: tuple[Event, ...] = ()
    """Added by this commit."""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple(
            Checkpoint(vchannel, base64.b64decode(shard.read_from), shard.resolved_ts)
            for vchannel, shard in self.shards.items()
            if shard.read_from or shard.resolved_ts
        )

    @property
    def complete_ts(self) -> int:
        """Every change at or below it is published; 0 while a vchannel has no checkpoint."""
        shards = min((shard.resolved_ts for shard in self.shards.values()), default=0)
        return max(shards, self.told_ts)

    @property
    def newest_ts(self) -> int:
        """No published change is newer, and no tick was seen beyond it."""
        shards = (max(shard.resolved_ts, shard.written_ts) for shard in self.shards.values())
        return max(self.told_ts, *shards, 0)

    def succeed(self, kind: str, epoch: int, writer: str, attempt: str, time_ms: int) -> Manifest:
        """The next one, with nothing in it yet."""
        return replace(
            self,
            number=self.number + 1,
            epoch=epoch,
            writer=writer,
            attempt=attempt,
            kind=kind,
            time_ms=time_ms,
            files=(),
            events=(),
        )

    def with_checkpoints(self, checkpoints: tuple[Checkpoint, ...]) -> Manifest:
        """Monotone: one that lies before what is held changes nothing."""
        shards = dict(self.shards)
        for each in checkpoints:
            held = shards.get(each.vchannel, Shard("", 0))
            if each.resolved_ts >= held.resolved_ts:
                place = base64.b64encode(each.read_from).decode()
                shards[each.vchannel] = replace(
                    held,
                    read_from=place,
                    resolved_ts=each.resolved_ts,
                    written=tuple(w for w in held.written if _ts(w) > each.resolved_ts),
                )
        return replace(self, shards=shards)


def before_first(table: Table) -> Manifest:
    """What the first one succeeds: number 0, which is never written."""
    return Manifest(
        number=0,
        epoch=0,
        writer="",
        attempt="",
        kind=OPEN,
        time_ms=0,
        collection_id=table.collection_id,
        task=table.task,
        task_uid=table.task_uid,
        source_database=table.source_database,
        source_collection=table.source_collection,
        generation=0,
        generation_from=0,
        database=table.database,
        collection=table.collection,
        schema="",
    )


def _ts(written: str) -> int:
    return int(written.partition(".")[0])


def dump(manifest: Manifest) -> bytes:
    """One line of JSON."""
    return orjson.dumps({"format": FORMAT, **asdict(manifest)}) + b"\n"


def load(text: bytes, where: str) -> Manifest:
    """Raises UserError MANIFEST_UNREADABLE, naming `where` it came from."""
    try:
        return from_json(orjson.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "MANIFEST_UNREADABLE",
            f"{where} is no manifest of a version known here ({type(error).__name__}: {error}); "
            "restore the file from a copy, or move the collection's folder away and resync it",
            field="sink.files.uri",
        ) from error


def from_json(data: dict[str, Any]) -> Manifest:
    """Raises ValueError, KeyError, TypeError."""
    if data["format"] > FORMAT:
        raise ValueError(f"format {data['format']}, known is {FORMAT}")
    known = {name: data[name] for name in Manifest.__slots__ if name in data}
    known["partitions"] = tuple(data["partitions"])
    known["dropped_partitions"] = tuple(data["dropped_partitions"])
    known["shards"] = {
        vchannel: Shard(**{**shard, "written": tuple(shard["written"])})
        for vchannel, shard in data["shards"].items()
    }
    known["files"] = tuple(FileEntry(**each) for each in data["files"])
    known["events"] = tuple(Event(**each) for each in data["events"])
    return Manifest(**known)
