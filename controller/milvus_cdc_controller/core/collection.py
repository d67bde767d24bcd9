"""One collection of one task: what is wanted at the sink, and how far its log has come.

Law: the wish (`CollectionRecord`) and the progress (`CollectionProgress`) are stored apart,
because the second changes every second; a progress is always stored before a wish that relies on
it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from milvus_cdc.model import Collection, Index, Load, ObjectState, collection_assignment_id

from milvus_cdc_controller.core.mapping import impossible_part, sink_name
from milvus_cdc_controller.core.names import Claim, Owner, collection_owner
from milvus_cdc_controller.core.task import Failure, TaskRecord


class Recounted(StrEnum):
    """How an owner says that a recount has ended."""

    NOT_YET = "NOT_YET"
    DONE = "DONE"
    WRITE_AGAIN = "WRITE_AGAIN"
    """Keys are at the sink too often or not at all, or it cannot tell."""


class CollectionState(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    PAUSED = "PAUSED"
    FAILED = "FAILED"
    DROPPING = "DROPPING"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Place in one shard's log: everything at or below `resolved_ts` is durable in the sink,
    nothing beyond `horizon_ts` can have been written.
    """

    vchannel: str
    pchannel: str
    read_from: bytes
    resolved_ts: int = 0
    horizon_ts: int = 0
    closed: bool = False
    incarnation: bytes = b""
    """Of the topic in which `read_from` was taken; empty until a reader has told it."""
    stored_ts: int = 0
    """Of a sink that keeps checkpoints itself: newest `resolved_ts` that it is known to hold."""


@dataclass(frozen=True, slots=True)
class Counters:
    rows_inserted: int = 0
    rows_upserted: int = 0
    rows_deleted: int = 0
    rows_skipped: int = 0
    rows_refused: int = 0
    bytes_written: int = 0
    """As the log holds them."""

    def plus(self, other: Counters) -> Counters:
        return Counters(
            self.rows_inserted + other.rows_inserted,
            self.rows_upserted + other.rows_upserted,
            self.rows_deleted + other.rows_deleted,
            self.rows_skipped + other.rows_skipped,
            self.rows_refused + other.rows_refused,
            self.bytes_written + other.bytes_written,
        )

    def minus(self, other: Counters) -> Counters:
        return Counters(
            self.rows_inserted - other.rows_inserted,
            self.rows_upserted - other.rows_upserted,
            self.rows_deleted - other.rows_deleted,
            self.rows_skipped - other.rows_skipped,
            self.rows_refused - other.rows_refused,
            self.bytes_written - other.bytes_written,
        )

    @property
    def rows_written(self) -> int:
        return self.rows_inserted + self.rows_upserted + self.rows_deleted


NO_ROWS = Counters()


@dataclass(frozen=True, slots=True)
class Recount:
    """An owner ended without a word: the keys that it may have written are to be counted."""

    starts: tuple[tuple[str, bytes, int], ...]
    """(vchannel, `read_from`, `resolved_ts`) of each open shard when its lease ended."""
    again: bool = False
    """They were found wrong: everything since is written once more."""
    lost_again: bool = False
    """An owner that did so was lost as well: what it may have sent is waited for, and what is wrong
    then is written once more, as after any loss.
    """


@dataclass(frozen=True, slots=True)
class PartReport:
    """What the present owner of a part counts and remarks, or the last one did."""

    assignment_id: str
    epoch: int
    current: Counters
    conditions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CollectionProgress:
    """Checkpoints and counters. `past` sums the epochs before `epoch`, `current` counts in it; the
    same of each part.
    """

    task_uid: str
    collection_id: int
    checkpoints: tuple[Checkpoint, ...] = ()
    epoch: int = 0
    past: Counters = NO_ROWS
    current: Counters = NO_ROWS
    conditions: tuple[tuple[str, str], ...] = ()
    recount: Recount | None = None
    parts: tuple[PartReport, ...] = ()
    whole_until_ts: int = 0
    """It is given out in one piece until every vchannel has passed this."""

    @property
    def totals(self) -> Counters:
        totals = self.past.plus(self.current)
        for part in self.parts:
            totals = totals.plus(part.current)
        return totals

    @property
    def resolved_ts(self) -> int:
        """The collection's watermark: the smallest over its open vchannels (over all once all are
        closed).
        """
        still_open = [point.resolved_ts for point in self.checkpoints if not point.closed]
        if still_open:
            return min(still_open)
        return max((point.resolved_ts for point in self.checkpoints), default=0)

    @property
    def closed(self) -> bool:
        return bool(self.checkpoints) and all(point.closed for point in self.checkpoints)


@dataclass(frozen=True, slots=True)
class Applied:
    """What an owner has carried out, rows aside; tells the source's changes from others'."""

    indexes: tuple[Index, ...]
    load: Load
    partition_ids: tuple[int, ...]
    alter_ts: int
    touched_indexes: tuple[str, ...] = ()
    """Names of those that the source has changed since, however often: an owner may have carried it
    out without living to say so.
    """
    touched_load: bool = False


def applied(want: Collection) -> Applied:
    alive = (p.partition_id for p in want.partitions if p.state is ObjectState.CREATED)
    return Applied(want.indexes, want.load, tuple(alive), want.alter_ts)


@dataclass(frozen=True, slots=True)
class CollectionRecord:
    """A collection as wanted at the sink.

    `want` has the database and name that were granted to it at the sink. Another name at the source
    is followed in three steps: the new name is granted when nobody else holds it (`want`), the
    owner renames at the sink, its word makes it `at_sink`; until then both names are held.
    """

    task_uid: str
    collection_id: int
    version: int
    want: Collection
    source_name: str
    """`database.collection` at the source now."""
    at_sink: str = ""
    """`database.collection` under which the sink is known to have it; empty until it is opened."""
    rename_ts: int = 0
    """TSO of the rename that the granted name comes from: rows at or below it come first."""
    started: bool = False
    """Its checkpoints hold real start positions."""
    holds_name: bool = False
    opened: bool = False
    sink_collection_id: int = 0
    recreate: bool = False
    resync: bool = False
    """Asked for; takes effect once nobody holds the assignment."""
    dropping: bool = False
    drop_granted: bool = False
    deselected: bool = False
    failure: Failure | None = None
    flush_ts: int = 0
    """TSO of the newest flush that the sink has not been asked for yet; 0 = none."""
    awaited_ts: int = 0
    """TSO that an alias waits, or has waited, for: its owner says at once when it is reached."""
    applied: Applied | None = None

    @property
    def assignment_id(self) -> str:
        return collection_assignment_id(self.task_uid, self.collection_id)

    @property
    def sink_name(self) -> str:
        """The name granted to it."""
        return self.want.full_name

    @property
    def now_at_sink(self) -> str:
        """The name to look for it at the sink now."""
        return self.at_sink or self.want.full_name

    @property
    def owner(self) -> Owner:
        return collection_owner(self.task_uid, self.collection_id)

    @property
    def renaming(self) -> bool:
        return bool(self.at_sink) and self.at_sink != self.want.full_name


def touched(before: CollectionRecord, now: CollectionRecord) -> CollectionRecord:
    """`now`, with what differs from `before` noted in what was carried out."""
    if now.applied is None or before.want is now.want:
        return now
    names = {index.name for index in set(before.want.indexes) ^ set(now.want.indexes)}
    load = before.want.load != now.want.load
    if not names and not load:
        return now
    noted = replace(
        now.applied,
        touched_indexes=tuple(sorted(names.union(now.applied.touched_indexes))),
        touched_load=load or now.applied.touched_load,
    )
    return replace(now, applied=noted)


def changed(record: CollectionRecord, **fields: object) -> CollectionRecord:
    """The record with other contents and the next version: its holder must hear of it."""
    return replace(record, version=record.version + 1, **fields)  # type: ignore[arg-type]


def named(want: Collection, full_name: str) -> Collection:
    database, _, name = full_name.partition(".")
    return replace(want, database=database, name=name)


def target_name(task: TaskRecord, record: CollectionRecord) -> str:
    """The name it should have at the sink, whoever holds that now."""
    if record.dropping:
        return record.sink_name
    return sink_name(task.spec.rename, record.source_name)


def claim_of(task: TaskRecord, record: CollectionRecord) -> Claim:
    """Which names it holds at its sink, and which one it would take now."""
    holds = {record.sink_name} if record.holds_name else set()
    if record.at_sink:
        holds.add(record.at_sink)
    waits, since_ts = "", 0
    if not record.holds_name:
        if not (record.deselected or record.failure is not None):
            waits, since_ts = record.sink_name, record.want.create_ts
    elif (
        record.opened
        and task.spec.carry.schema
        and not (
            record.renaming or record.resync or record.deselected or record.failure is not None
        )
    ):
        target = target_name(task, record)
        if target not in holds and (target == record.source_name or not impossible_part(target)):
            waits, since_ts = target, record.want.alter_ts
    return Claim(record.owner, task.spec.sink_id, frozenset(holds), waits, since_ts)


def start_checkpoints(want: Collection) -> tuple[Checkpoint, ...]:
    """From each shard's CreateCollection message on: nothing of it can be in the sink."""
    return tuple(Checkpoint(v.vchannel, v.pchannel, v.start_position) for v in want.vchannels)
