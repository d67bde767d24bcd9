"""What must hold, looked at after every step that could break it.

Laws: it looks at what was stored, sent, and put into the sink, never at what somebody means to do;
and it knows what the users of the source did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from milvus_cdc.etcd import DeleteOp, GetOp, PutOp
from milvus_cdc.model import part_of_assignment, split_assignment_id, tso_to_ms
from milvus_cdc.source.positions import decode as decode_position
from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.store.records import decode
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.sim.latecomers import NEVER
from tests.sim.sink import InFlight, Rows, SinkServer, Writer
from tests.sim.source import Milvus, Table
from tests.sim.staleness import stale, undecidable, when

if TYPE_CHECKING:
    from tests.sim.processes import ReplicatorHost

RECORDS = "milvus-cdc/records/"


class Violation(AssertionError):
    """Something that must never happen has happened."""


class Referee:
    """Sees the store, the stream and the sink."""

    def __init__(self, milvus: Milvus, sink: SinkServer, say: Callable[[str, str], None]) -> None:
        self._milvus = milvus
        self._sink = sink
        self._say = say
        self.grants: dict[str, Grant] = {}
        self.progress: dict[str, CollectionProgress] = {}
        self.collections: dict[str, CollectionRecord] = {}
        self.tasks: dict[str, TaskRecord] = {}
        self.replicators: list[ReplicatorHost] = []
        self.orphans: list[tuple[str, InFlight]] = []
        """What processes that died had sent."""
        self.violation: Violation | None = None
        """The first one."""
        self.takeovers = 0
        self.splits = 0
        self.rows = 0
        self.epochs: dict[str, int] = {}
        self.starts: dict[str, set[int]] = {}
        """Per vchannel: checkpoints with which an owner began."""
        self.excused = 0
        self._strayed: dict[int, set[int]] = {}
        """By collection: keys of requests that took effect after their time, until a recount."""

    def fail(self, what: str) -> None:
        if self.violation is None:
            self.violation = Violation(what)
            self._say("REFEREE", f"VIOLATION: {what}")

    def strayed(self, table: Table, keys: Sequence[int]) -> None:
        """What the sink holds of these keys counts again when a recount has ended."""
        self._strayed.setdefault(table.collection_id, set()).update(keys)

    # ---- the store

    def committed(self, operations: Sequence[PutOp | DeleteOp | GetOp]) -> None:
        """One transaction of a controller."""
        for operation in operations:
            if isinstance(operation, PutOp) and operation.key.startswith(RECORDS):
                key = operation.key[len(RECORDS) :]
                record = decode(key, operation.value)
                match record:
                    case Grant():
                        self._granted(record)
                    case CollectionProgress():
                        self._progressed(record)
                    case CollectionRecord():
                        self.collections[record.assignment_id] = record
                        if record.failure is not None:
                            self.fail(f"{record.source_name} failed: {record.failure}")
                    case TaskRecord():
                        self.tasks[record.uid] = record
                        if record.failure is not None:
                            self.fail(f"the task failed: {record.failure}")
                    case _:
                        pass
            elif isinstance(operation, DeleteOp):
                self._forgotten(operation.range.start.decode())

    def _forgotten(self, key: str) -> None:
        kind, _, name = key.removeprefix(RECORDS).partition("/")
        name = name.replace("/", ".")
        if kind == "assignments":
            self.grants.pop(name, None)
        elif kind == "checkpoints":
            self.progress.pop(name, None)
        elif kind == "collections":
            self.collections.pop(name, None)

    def _granted(self, grant: Grant) -> None:
        assignment_id = grant.assignment_id
        spent = self.epochs.get(assignment_id, 0)
        if grant.epoch < spent:
            self.fail(f"{assignment_id}: epoch {grant.epoch} after {spent}")
        before = self.grants.get(assignment_id)
        self.epochs[assignment_id] = max(spent, grant.epoch)
        self.grants[assignment_id] = grant
        if not grant.instance or (before is not None and before.epoch == grant.epoch):
            return
        if grant.epoch <= spent:
            self.fail(f"{assignment_id}: epoch {grant.epoch} was given twice")
        self._say("store", f"{assignment_id} is {grant.owner}'s, epoch {grant.epoch}")
        self.takeovers += grant.epoch > 1
        self.splits += part_of_assignment(assignment_id) is not None
        self._began(self.progress.get(whole_of(assignment_id)))
        self._alone(grant)
        for host in self.replicators:
            why = host.may_write(assignment_id, grant.epoch)
            if why:
                self.fail(
                    f"{assignment_id} was given to {grant.owner} (epoch {grant.epoch}) "
                    f"while {host.host} may still write: {why}"
                )

        for name, in_flight in self.orphans:
            if why := in_flight.older(assignment_id, grant.epoch, self._milvus.clockwork.now):
                self.fail(
                    f"{assignment_id} was given to {grant.owner} while {name}, dead, has {why}"
                )

    def _began(self, progress: CollectionProgress | None) -> None:
        stored = {p.vchannel: p.resolved_ts for p in progress.checkpoints} if progress else {}
        recounted = progress.recount.starts if progress and progress.recount else ()
        for vchannel, ts in [*stored.items(), *((v, ts) for v, _, ts in recounted)]:
            self.starts.setdefault(vchannel, set()).add(ts)

    def _wrong(self, table: Table, key: int, values: list[tuple[str, str]], until: int) -> str:
        """As `stale` says, but for what no owner could know."""
        if key in self._strayed.get(table.collection_id, ()):
            return ""
        wrong = stale(table, key, values, until)
        if wrong and len(values) < 2 and self._nobody_knows(table, key, until):
            self.excused += 1
            return ""
        return wrong

    def _nobody_knows(self, table: Table, key: int, until: int) -> bool:
        starts = self.starts.get(table.shard_of(key)[0], set())
        return undecidable(table, key, until, starts)

    def _alone(self, grant: Grant) -> None:
        """Nobody has anything of the other shape: the whole, or a part."""
        part = part_of_assignment(grant.assignment_id)
        for other, spent in self.epochs.items():
            if whole_of(other) != whole_of(grant.assignment_id):
                continue
            if _count(part_of_assignment(other)) == _count(part):
                continue
            held = self.grants.get(other)
            if held is not None and held.instance:
                self.fail(f"{grant.assignment_id} was given while {held.owner} has {other}")
            for host in self.replicators:
                if why := host.may_write(other, spent + 1):
                    self.fail(
                        f"{grant.assignment_id} was given to {grant.owner} while {host.host} may "
                        f"still write {other}: {why}"
                    )
            for name, in_flight in self.orphans:
                if why := in_flight.older(other, spent + 1, self._milvus.clockwork.now):
                    self.fail(f"{grant.assignment_id} was given while {name}, dead, has {why}")

    def _progressed(self, progress: CollectionProgress) -> None:
        assignment_id = f"{progress.task_uid}.{progress.collection_id}"
        before = self.progress.get(assignment_id)
        self.progress[assignment_id] = progress
        table = self.table(assignment_id)
        if table is None:
            return
        if before and before.recount and not progress.recount:
            self._recounted(table, progress)
        old = {point.vchannel: point for point in before.checkpoints} if before else {}
        for point in progress.checkpoints:
            was = old.get(point.vchannel)
            if was is not None:
                if point.resolved_ts < was.resolved_ts:
                    self.fail(f"{point.vchannel}: the checkpoint went back")
                if decode_position(point.read_from) < decode_position(was.read_from):
                    self.fail(f"{point.vchannel}: read_from went back")
                if point.horizon_ts < was.horizon_ts:
                    self.fail(f"{point.vchannel}: the horizon went back")
                if was.closed and not point.closed:
                    self.fail(f"{point.vchannel}: opened again")
            after = was.resolved_ts if was is not None else 0
            # What is written again is behind its checkpoint, and owed from the recount's start.
            owed = _starts(before)
            if not _starts(progress):
                after = owed.get(point.vchannel, after)
                if point.resolved_ts > after:
                    self._checkpoint_is_true(table, point.vchannel, after, point.resolved_ts)
            self._nothing_left_behind(table, point.vchannel, point.pchannel, point)

    def _recounted(self, table: Table, progress: CollectionProgress) -> None:
        resolved = {point.vchannel: point.resolved_ts for point in progress.checkpoints}
        values = self._sink.values(table.name)
        for key in sorted(self._strayed.pop(table.collection_id, ())):
            until = resolved[table.shard_of(key)[0]]
            if wrong := self._wrong(table, key, values.get(key, []), until):
                self.fail(f"the keys of {table.name} count as right: {wrong}")

    def _checkpoint_is_true(self, table: Table, vchannel: str, after: int, until: int) -> None:
        if table.dropped_ts:
            return
        values = self._sink.values(table.name)
        for key in sorted({op.key for op in table.between(vchannel, after, until)}):
            if wrong := self._wrong(table, key, values.get(key, []), until):
                self.fail(f"the checkpoint of {vchannel} is ahead of the sink: {wrong}")

    def _nothing_left_behind(
        self, table: Table, vchannel: str, pchannel: str, point: object
    ) -> None:
        read_from = decode_position(point.read_from)  # type: ignore[attr-defined]
        resolved_ts = point.resolved_ts  # type: ignore[attr-defined]
        topic = self._milvus.queue.topics[pchannel]
        for offset in range(len(topic.stamps) - 1, -1, -1):
            order = topic.first + offset
            whose, ts = topic.stamps[offset]
            if order < read_from and ts > resolved_ts and whose == vchannel:
                self.fail(
                    f"{vchannel}: entry {order} ({when(ts)}) lies before read_from {read_from}"
                )
            if order < read_from and tso_to_ms(ts) < tso_to_ms(resolved_ts) - 20_000:
                break

    def look(self) -> None:
        """Nobody can write who has been followed by another."""
        for assignment_id, epoch in self.epochs.items():
            if assignment_id not in self.grants:
                continue
            for host in self.replicators:
                if why := host.may_write(assignment_id, epoch):
                    self.fail(f"{host.host} may write {assignment_id}, now at {epoch}: {why}")

    # ---- the stream

    def told(self, response: pb.ConnectResponse) -> None:
        """A message leaves a controller: what it says must be stored."""
        kind = response.WhichOneof("message")
        if kind == "assign" and response.assign.WhichOneof("spec") == "collection":
            assign = response.assign
            grant = self.grants.get(assign.assignment_id)
            if grant is not None and grant.epoch < assign.epoch:
                self.fail(f"{assign.assignment_id}: epoch {assign.epoch} was sent unsaved")
            self._horizons(
                assign.assignment_id,
                [(v.vchannel, v.horizon_ts) for v in assign.collection.vchannels],
            )
        elif kind == "progress_ack":
            ack = response.progress_ack
            self._horizons(ack.assignment_id, [(h.vchannel, h.horizon_ts) for h in ack.horizons])

    def _horizons(self, assignment_id: str, told: list[tuple[str, int]]) -> None:
        progress = self.progress.get(whole_of(assignment_id))
        if progress is None:
            return
        stored = {point.vchannel: point.horizon_ts for point in progress.checkpoints}
        for vchannel, horizon_ts in told:
            if horizon_ts > stored.get(vchannel, 0):
                self.fail(
                    f"{vchannel}: horizon {when(horizon_ts)} was granted before it was stored"
                )

    # ---- the sink

    def before_write(self, writer: Writer, rows: Rows) -> None:
        epoch = self.epochs.get(writer.assignment_id, 0)
        who = f"{writer.host}'s {rows} of epoch {writer.epoch}"
        if writer.epoch < epoch:
            self.fail(f"{who} landed when epoch {epoch} was given")
        whole = whole_of(writer.assignment_id)
        progress, table = self.progress.get(whole), self.table(whole)
        if progress is None or table is None:
            return
        if part := part_of_assignment(writer.assignment_id):
            own = {point.vchannel for point in progress.checkpoints[part[0] - 1 :: part[1]]}
            if strange := [key for key in rows.keys if table.shard_of(key)[0] not in own]:
                self.fail(f"{who}: {strange} are of shards that are no part of it")
        stored = {point.vchannel: point.horizon_ts for point in progress.checkpoints}
        for key, text in rows.texts.items():
            if int(text) > stored[table.shard_of(key)[0]]:
                self.fail(f"{who}: key {key} of {when(int(text))} lies beyond the horizon")

    def after_write(self, writer: Writer, rows: Rows) -> None:
        self.rows += len(rows.keys)
        self._say("sink", f"{rows}, by {writer.host} in epoch {writer.epoch}")
        table = self.table(writer.assignment_id)
        progress = self.progress.get(whole_of(writer.assignment_id))
        if table is None or progress is None:
            return
        resolved = {point.vchannel: point.resolved_ts for point in progress.checkpoints}
        resolved |= _starts(progress)
        values = self._sink.values(table.name)
        for key in rows.keys:
            until = resolved[table.shard_of(key)[0]]
            if wrong := self._wrong(table, key, values.get(key, []), until):
                self.fail(f"after {writer.host}'s {rows}: {wrong}")

    def dropping(self, collection_id: int) -> None:
        """A collection goes only when every row before its drop has come."""
        for assignment_id, progress in self.progress.items():
            if split_assignment_id(assignment_id)[1] != collection_id:
                continue
            for point in progress.checkpoints:
                if not point.closed:
                    self.fail(f"{assignment_id} is dropped before {point.vchannel} has ended")

    # ---- the end

    def behind(self) -> str:
        """What is not yet as at the source; empty when everything is."""
        if self._milvus.latecomers.held:
            return "rows are on their way into the log"
        for table in self._milvus.tables:
            if table.dropped_ts:
                continue
            if wrong := self.differs(table):
                return wrong
            assignment_id = self.assignment_of(table)
            progress = self.progress.get(assignment_id) if assignment_id else None
            if progress is None:
                return f"{table.name} has no checkpoint"
            for point in progress.checkpoints:
                last = table.by_shard.get(point.vchannel, [])
                if last and point.resolved_ts < last[-1].due:
                    return f"{point.vchannel} is resolved up to {when(point.resolved_ts)}"
        wanted = {table.name for table in self._milvus.tables if not table.dropped_ts}
        if extra := sorted(set(self._sink.memory.collections("default")) - wanted):
            return f"the sink has {extra}"
        return ""

    def differs(self, table: Table) -> str:
        """How the sink's rows differ from the source's; empty when they do not."""
        wanted = {key: [op.text] for key, op in table.live.items()}
        values = self._sink.values(table.name)
        found = {key: [text for _, text in copies] for key, copies in values.items()}
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                if len(found.get(key, [])) < 2 and self._nobody_knows(table, key, NEVER):
                    self.excused += 1
                    continue
                return f"{table.name} key {key}: {found.get(key)} instead of {wanted.get(key)}"
        return ""

    # ---- inside

    def table(self, assignment_id: str) -> Table | None:
        _, collection_id = split_assignment_id(assignment_id)
        for table in self._milvus.tables:
            if table.collection_id == collection_id:
                return table
        return None

    def assignment_of(self, table: Table) -> str | None:
        for assignment_id in self.progress:
            if split_assignment_id(assignment_id)[1] == table.collection_id:
                return assignment_id
        return None


def _count(part: tuple[int, int] | None) -> int:
    return 1 if part is None else part[1]


def whole_of(assignment_id: str) -> str:
    uid, collection_id = split_assignment_id(assignment_id)
    return f"{uid}.{'metadata' if collection_id is None else collection_id}"


def _starts(progress: CollectionProgress | None) -> dict[str, int]:
    """Up to where each open shard is sound while everything since is written again."""
    if progress is None or progress.recount is None or not progress.recount.again:
        return {}
    return {vchannel: ts for vchannel, _, ts in progress.recount.starts}
