"""A source Milvus: its metadata in an etcd, its log in a queue, and what its users do.

Laws, Milvus': a log is sorted only between ticks, a tick comes when everything at or below it is
there (but see `latecomers`), and a message newer than a tick may lie before it; an upsert is an
insert and a delete of one timestamp; metadata and log come by different roads.
"""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from milvus_cdc.etcd import PutOp
from milvus_cdc.milvus_protos import common_pb2, msg_pb2, schema_pb2
from milvus_cdc.model import ms_to_tso
from milvus_cdc.source.positions import encode
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from milvuscdc.internal import milvus_meta_pb2 as meta_pb

from tests.sim.clockwork import START_UNIX, Clockwork
from tests.sim.etcd import Etcd
from tests.sim.latecomers import Latecomers
from tests.sim.queue import Queue, Topic

META = "by-dev/meta/"
KEYS_PER_SHARD = 12
LATE_DROP_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Op:
    """What a user did to one key; `text` is None where it was deleted. An upsert is one, unless its
    halves came into the log apart.
    """

    ts: int
    key: int
    text: str | None
    partition: Partition | None = None
    behind_ts: int = 0
    """The tick that it stands behind, where that did not wait for it."""

    @property
    def due(self) -> int:
        """A checkpoint from there on says that it is done: at or beyond its time, and its first
        tick stands behind it.
        """
        return max(self.ts, self.behind_ts + 1) if self.behind_ts else self.ts


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One entry of a log, and what it does where it stands alone."""

    vchannel: str
    payload: bytes
    table: Table | None = None
    ops: Sequence[Op] = ()


@dataclass(slots=True)
class Partition:
    partition_id: int
    name: str
    create_ts: int
    dropped: bool = False


@dataclass(slots=True)
class Table:
    """One collection of the source, and everything that was ever done to it."""

    collection_id: int
    name: str
    shards: list[tuple[str, str]]
    """(vchannel, pchannel)."""
    create_ts: int
    starts: dict[str, bytes]
    partitions: list[Partition]
    dropped_ts: int = 0
    live: dict[int, Op] = field(default_factory=dict)
    by_key: dict[int, list[Op]] = field(default_factory=dict)
    by_shard: dict[str, list[Op]] = field(default_factory=dict)

    def shard_of(self, key: int) -> tuple[str, str]:
        return self.shards[key % len(self.shards)]

    def note(self, op: Op) -> None:
        self.log(op)
        if op.text is None:
            self.live.pop(op.key, None)
        else:
            self.live[op.key] = op

    def log(self, op: Op) -> None:
        """It is in the log, or will be before any tick that covers it."""
        insort(self.by_key.setdefault(op.key, []), op, key=_effect)
        insort(self.by_shard.setdefault(self.shard_of(op.key)[0], []), op, key=_due)

    def unlog(self, op: Op) -> None:
        """It will not, if it was to."""
        for ops in (self.by_key.get(op.key, []), self.by_shard[self.shard_of(op.key)[0]]):
            if op in ops:
                ops.remove(op)

    def last_at(self, key: int, ts: int) -> Op | None:
        """The newest thing done to the key that a checkpoint says is done."""
        return next((op for op in reversed(self.by_key.get(key, [])) if op.due <= ts), None)

    def between(self, vchannel: str, after: int, until: int) -> list[Op]:
        """What a checkpoint says is done that the one before did not."""
        ops = self.by_shard.get(vchannel, [])
        return ops[bisect_right(ops, after, key=_due) : bisect_right(ops, until, key=_due)]


def _effect(op: Op) -> tuple[int, bool]:
    return op.ts, op.text is not None


def _due(op: Op) -> int:
    return op.due


class Milvus:
    """The source cluster: what users do to it goes to the log and to the metadata."""

    def __init__(
        self,
        clockwork: Clockwork,
        etcd: Etcd,
        queue: Queue,
        rng: random.Random,
        late_rng: random.Random,
    ) -> None:
        self.clockwork = clockwork
        self.etcd = etcd
        self.queue = queue
        self.tables: list[Table] = []
        self.late_drops = False
        """The message of a partition's drop is stamped when it is sent, after the metadata."""
        self._rng = rng
        self._count = 0
        self._ids = 100
        self.last_tick: dict[str, int] = {}
        self.latecomers = Latecomers(clockwork, queue, self.last_tick, late_rng)
        etcd.txn(
            (),
            [
                PutOp(
                    f"{META}root-coord/database/db-info/1",
                    meta_pb.DatabaseInfo(
                        id=1, name="default", state=1, created_time=7
                    ).SerializeToString(),
                )
            ],
        )
        self._save_time()

    # ---- time

    def ts(self) -> int:
        """A timestamp newer than all before."""
        self._count += 1
        ms = int((START_UNIX + self.clockwork.now) * 1000)
        return ms_to_tso(ms) + self._count % 200_000

    def _save_time(self) -> None:
        ns = int((START_UNIX + self.clockwork.now + 3) * 1e9)
        self.etcd.txn((), [PutOp("by-dev/kv/gid/timestamp", ns.to_bytes(8, "big"))])

    # ---- schema

    def create(self, name: str, pchannels: list[str]) -> Table:
        self._ids += 1
        number, ts = self._ids, self.ts()
        for pchannel in pchannels:
            if pchannel not in self.queue.topics:
                self.queue.topics[pchannel] = Topic(encode(len(self.queue.topics) + 1))
        table = Table(
            number,
            name,
            [(f"{p}_{number}v{index}", p) for index, p in enumerate(pchannels)],
            ts,
            {p: encode(self.queue.topics[p].end) for p in pchannels},
            [Partition(number * 1000, "_default", ts)],
        )
        self.tables.append(table)
        self._save_time()
        puts = [self._info(table, 0)]
        for one in _fields():
            puts.append(
                PutOp(f"{META}root-coord/fields/{number}/{one.fieldID}", one.SerializeToString())
            )
        puts.append(self._partition(table, table.partitions[0], 0))
        self.etcd.txn((), puts)
        return table

    def add_partition(self, table: Table, name: str) -> Partition:
        self._ids += 1
        made = Partition(table.collection_id * 1000 + self._ids, name, self.ts())
        table.partitions.append(made)
        # Before any row of it; a watcher may hear of the rows first.
        self.etcd.txn((), [self._partition(table, made, 0)])
        return made

    def drop_partition(self, table: Table, partition: Partition) -> None:
        partition.dropped = True
        ts = self.ts()
        if self.late_drops:
            late = self.clockwork.now + LATE_DROP_SECONDS
            self.clockwork.at(late, lambda: self._tell_drop(table, partition, self.ts()))
        else:
            self._tell_drop(table, partition, ts)
        snapshot = f"{META}snapshots/root-coord/partitions/{table.collection_id}"
        self.etcd.txn(
            (),
            [
                self._partition(table, partition, 2),
                PutOp(f"{snapshot}/{partition.partition_id}_ts{ts}", b"x"),
            ],
        )

    def _tell_drop(self, table: Table, partition: Partition, ts: int) -> None:
        for key, op in list(table.live.items()):
            if op.partition is partition:
                table.note(Op(ts, key, None, partition))
        message = msg_pb2.DropPartitionRequest(
            base=common_pb2.MsgBase(msg_type=common_pb2.DropPartition, timestamp=ts),
            collectionID=table.collection_id,
            partitionID=partition.partition_id,
            partition_name=partition.name,
        ).SerializeToString()
        for _, pchannel in table.shards:
            self.queue.topics[pchannel].pending.append((ts, [Message("", message)]))

    def drop(self, table: Table) -> None:
        ts = table.dropped_ts = self.ts()
        message = msg_pb2.DropCollectionRequest(
            base=common_pb2.MsgBase(msg_type=common_pb2.DropCollection, timestamp=ts),
            collectionID=table.collection_id,
        ).SerializeToString()
        for _, pchannel in table.shards:
            self.queue.topics[pchannel].pending.append((ts, [Message("", message)]))
        snapshot = f"{META}snapshots/root-coord/database/collection-info/1/{table.collection_id}"
        self.etcd.txn((), [self._info(table, 2), PutOp(f"{snapshot}_ts{ts}", b"x")])

    def _info(self, table: Table, state: int) -> PutOp:
        info = meta_pb.CollectionInfo(
            id=table.collection_id,
            schema=schema_pb2.CollectionSchema(name=table.name).SerializeToString(),
            create_time=table.create_ts,
            virtual_channel_names=[v for v, _ in table.shards],
            physical_channel_names=[p for _, p in table.shards],
            shards_num=len(table.shards),
            start_positions=[meta_pb.KeyData(key=p, data=d) for p, d in table.starts.items()],
            state=state,
            db_id=1,
        )
        place = f"{META}root-coord/database/collection-info/1/{table.collection_id}"
        return PutOp(place, info.SerializeToString())

    def _partition(self, table: Table, partition: Partition, state: int) -> PutOp:
        info = meta_pb.PartitionInfo(
            partition_id=partition.partition_id,
            partition_name=partition.name,
            partition_created_timestamp=partition.create_ts,
            collection_id=table.collection_id,
            state=state,
        )
        place = f"{META}root-coord/partitions/{table.collection_id}/{partition.partition_id}"
        return PutOp(place, info.SerializeToString())

    # ---- rows

    def work(self, table: Table) -> None:
        """One request of a user."""
        rng = self._rng
        shard = rng.randrange(len(table.shards))
        vchannel, pchannel = table.shards[shard]
        count = len(table.shards)
        keys = sorted(
            k * count + shard for k in rng.sample(range(KEYS_PER_SHARD), rng.randint(1, 4))
        )
        partition = rng.choice([p for p in table.partitions if not p.dropped])
        ts = self.ts()
        choice = rng.random()
        group: list[Message] = []
        if choice < 0.25:
            # Of one partition or of all; a key that is not there is asked for as well.
            ops = [Op(ts, key, None) for key in keys]
            for op in ops:
                table.note(op)
            group.append(Message(vchannel, _delete(table, vchannel, ts, keys), table, ops))
        else:
            fresh = [k for k in keys if k not in table.live]
            old = [k for k in keys if k in table.live]
            if fresh and choice < 0.65:
                rows, replaced = fresh, []
            else:
                # An upsert stays in the partition of its row, as those of most users do.
                old = [k for k in old if table.live[k].partition is partition]
                rows, replaced = [*fresh, *old], [*fresh, *old]
            if not rows:
                return
            ops = [Op(ts, key, str(ts), partition) for key in rows]
            for op in ops:
                table.note(op)
            insert = _insert(table, vchannel, ts, rows, partition)
            group.append(Message(vchannel, insert, table, ops))
            if replaced:
                delete = _delete(table, vchannel, ts, replaced, partition)
                gone = [Op(ts, key, None, partition) for key in replaced]
                group.append(Message(vchannel, delete, table, gone))
        self.queue.topics[pchannel].pending.append((ts, group))

    def tick(self, pchannel: str) -> None:
        """What is on its way arrives, all that the next tick covers and some that it does not."""
        rng, topic = self._rng, self.queue.topics[pchannel]
        pending = sorted(topic.pending, key=lambda group: group[0])
        ts = self.ts()
        if pending and rng.random() < 0.5:
            ts = pending[rng.randrange(len(pending))][0]
        if ts <= self.last_tick.get(pchannel, 0):
            return
        due = [group for group in pending if group[0] <= ts]
        early = [group for group in pending if group[0] > ts and rng.random() < 0.5]
        topic.pending = [group for group in pending if group not in due and group not in early]
        arriving = due + early
        rng.shuffle(arriving)
        for stamp, messages in arriving:
            now = self.latecomers.sift(pchannel, stamp, messages)
            for message in messages:
                if message in now:
                    self.queue.append(pchannel, message.payload, message.vchannel, stamp)
                if rng.random() < 0.15:
                    self.queue.tell(pchannel)  # readers may stop anywhere
        header = log_pb2.LogHeader(base=log_pb2.LogBase(msg_type=common_pb2.TimeTick, timestamp=ts))
        self.queue.append(pchannel, header.SerializeToString(), "", ts)
        self.last_tick[pchannel] = ts
        self.queue.tell(pchannel)


def _fields() -> list[schema_pb2.FieldSchema]:
    key = schema_pb2.FieldSchema(
        fieldID=100, name="id", is_primary_key=True, data_type=schema_pb2.Int64
    )
    text = schema_pb2.FieldSchema(fieldID=101, name="text", data_type=schema_pb2.VarChar)
    text.type_params.add(key="max_length", value="64")
    return [key, text]


def _insert(table: Table, vchannel: str, ts: int, keys: list[int], partition: Partition) -> bytes:
    ids = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    ids.scalars.long_data.data.extend(keys)
    texts = schema_pb2.FieldData(type=schema_pb2.VarChar, field_name="text", field_id=101)
    texts.scalars.string_data.data.extend([str(ts)] * len(keys))
    return log_pb2.LogInsert(
        base=log_pb2.LogBase(msg_type=common_pb2.Insert, timestamp=ts),
        shard_name=vchannel,
        partition_name=partition.name,
        collection_id=table.collection_id,
        partition_id=partition.partition_id,
        timestamps=[ts] * len(keys),
        fields_data=[ids.SerializeToString(), texts.SerializeToString()],
        num_rows=len(keys),
        version=1,
    ).SerializeToString()


def _delete(
    table: Table, vchannel: str, ts: int, keys: list[int], partition: Partition | None = None
) -> bytes:
    return log_pb2.LogDelete(
        base=log_pb2.LogBase(msg_type=common_pb2.Delete, timestamp=ts),
        shard_name=vchannel,
        partition_name="" if partition is None else partition.name,
        collection_id=table.collection_id,
        partition_id=-1 if partition is None else partition.partition_id,
        primary_keys=log_pb2.LogKeys(int_id=log_pb2.LogInt64Array(data=keys)),
        timestamps=[ts] * len(keys),
        num_rows=len(keys),
    ).SerializeToString()
