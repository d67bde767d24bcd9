"""Whatever is interrupted wherever, the sink ends with exactly the source's rows: none missing,
extra, different, doubled.

The source's log, the sink and the controller's store are models of a few lines; the core is the
shipped one.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.model import Collection, ObjectState, Partition, ms_to_tso
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Rank
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.effects import (
    CreatePartition,
    DropPartition,
    QueryPartition,
    StartWrite,
)
from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.core.sequencer import WriteLimits


@dataclass(frozen=True)
class Entry:
    kind: str  # tick, insert, delete
    ts: int
    rows: tuple[tuple[int, str], ...] = ()


@dataclass
class Stored:
    """What the controller keeps of one vchannel."""

    read_from: bytes
    resolved_ts: int = 0
    horizon_ts: int = 0


def position(order: int) -> bytes:
    return order.to_bytes(8, "little")


def make_log(
    rng: random.Random, lane: int, lanes: int, steps: int
) -> tuple[list[Entry], dict[int, str]]:
    """A log as Milvus writes it: unsorted between ticks, upserts as insert then delete at one
    timestamp.
    """
    live: dict[int, str] = {}
    keys = [k for k in range(40) if k % lanes == lane]
    ts = ms_to_tso(1_000)
    tick = ts
    log: list[Entry] = []
    pending: list[list[Entry]] = []
    for step in range(steps):
        ts += ms_to_tso(rng.randint(1, 400))
        choice = rng.random()
        chosen = rng.sample(keys, rng.randint(1, 5))
        if choice < 0.45:
            fresh = [k for k in chosen if k not in live]
            rows = tuple((k, f"i{step}") for k in fresh)
            if rows:
                live.update(rows)
                pending.append([Entry("insert", ts, rows)])
        elif choice < 0.7:
            rows = tuple((k, f"u{step}") for k in chosen)
            live.update(rows)
            pending.append([Entry("insert", ts, rows), Entry("delete", ts, rows)])
        else:
            for k in chosen:
                live.pop(k, None)
            pending.append([Entry("delete", ts, tuple((k, "") for k in chosen))])
        if rng.random() < 0.4:
            # The tick promises what is at or below it; later messages may lie before it.
            tick = rng.choice([tick, *(group[0].ts for group in pending)])
            due = [g for g in pending if g[0].ts <= tick]
            early = [g for g in pending if g[0].ts > tick and rng.random() < 0.5]
            pending = [g for g in pending if g not in due and g not in early]
            groups = due + early
            rng.shuffle(groups)
            log.extend(entry for group in groups for entry in group)
            log.append(Entry("tick", tick))
    rng.shuffle(pending)
    log.extend(entry for group in pending for entry in group)
    log.append(Entry("tick", ts + 1))
    return log, live


class ModelSink:
    """Rows as a Milvus keeps them: a plain insert of a key that is there doubles it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []

    def apply(self, kind: WriteKind, rows: list[tuple[int, str]]) -> None:
        if kind is WriteKind.INSERT:
            self.rows.extend(rows)
            return
        keys = {k for k, _ in rows}
        self.rows = [row for row in self.rows if row[0] not in keys]
        if kind is WriteKind.UPSERT:
            assert len(keys) == len(rows), "a key twice in one upsert request"
            self.rows.extend(rows)


def rows_of(write: Write) -> list[tuple[int, str]]:
    return [row for op in write.ops for row in op.payload.rows]


LIVES = 200


def run(seed: int, lanes: int, steps: int, crash_rate: float, forget_rate: float) -> None:
    rng = random.Random(seed)
    logs: dict[str, list[Entry]] = {}
    expected: list[tuple[int, str]] = []
    for index in range(lanes):
        entries, live = make_log(rng, index, lanes, steps)
        logs[f"p{index}_7v{index}"] = entries
        expected.extend(live.items())
    store = {v: Stored(position(0)) for v in logs}
    sink = ModelSink()
    want = Collection(
        7, 1, "default", "c", b"", lanes, 0, 1, partitions=(Partition(70, "_default", 1),)
    )
    limits = WriteLimits(rows_per_request=8, bytes_per_request=1 << 20, in_flight=3)
    for life in range(LIVES):
        core = AssignmentCore(
            want,
            [
                Lane(
                    v,
                    v.split("_")[0],
                    read_from=s.read_from,
                    resolved_ts=s.resolved_ts,
                    horizon_ts=s.horizon_ts,
                    closed=False,
                )
                for v, s in store.items()
            ],
            limits,
            partition_key=False,
        )
        core.mark_opened(0)
        at = {v: int.from_bytes(s.read_from, "little") for v, s in store.items()}
        in_flight: dict[int, tuple[Write, WriteKind, bool]] = {}
        while True:
            # Who forgets all the time may need longer than a life: the last one is long.
            if rng.random() < crash_rate and life < LIVES - 1:
                for write, kind, applied in in_flight.values():
                    if not applied and rng.random() < 0.5:
                        sink.apply(kind, rows_of(write))
                break
            action = rng.random()
            readable = [v for v in logs if at[v] < len(logs[v])]
            if action < 0.4 and readable:
                v = rng.choice(readable)
                entry = logs[v][at[v]]
                lane = core.lanes[v]
                if entry.kind == "tick":
                    lane.tick(entry.ts, position(at[v]))
                else:
                    keys = frozenset(k for k, _ in entry.rows)
                    lane.add(
                        LogOp(
                            Rank.INSERT if entry.kind == "insert" else Rank.DELETE,
                            entry.ts,
                            at[v],
                            position(at[v]),
                            entry,
                            size=10,
                            rows=len(entry.rows),
                            partition_id=70 if entry.kind == "insert" else -1,
                            load_keys=partial(frozenset, keys),
                        )
                    )
                at[v] += 1
                if lane.may_forget and rng.random() < forget_rate:
                    lane.forget(rng.choice((0, 20, 1_000)))
                if (again := lane.take_reread()) is not None:
                    at[v] = int.from_bytes(again, "little")
            elif action < 0.7 and in_flight:
                write_id = rng.choice(list(in_flight))
                write, kind, applied = in_flight[write_id]
                if not applied:
                    sink.apply(kind, rows_of(write))
                if rng.random() < 0.1 and kind is not WriteKind.DELETE:
                    # The answer is lost: again, as an upsert.
                    in_flight[write_id] = (write, WriteKind.UPSERT, False)
                else:
                    del in_flight[write_id]
                    core.write_done(write_id)
            elif action < 0.85:
                for v, lane in core.lanes.items():
                    assert lane.resolved_ts >= store[v].resolved_ts, "a checkpoint went back"
                    horizon = max(store[v].horizon_ts, core.wanted_horizon(lane))
                    store[v] = Stored(lane.read_from, lane.resolved_ts, horizon)
                    core.grant(v, horizon)
            for effect in core.step():
                assert isinstance(effect, StartWrite)
                write = effect.write
                if write.kind is WriteKind.INSERT:
                    assert all(
                        op.ts <= max(s.horizon_ts for s in store.values()) for op in write.ops
                    )
                applied = rng.random() < 0.5
                if applied:
                    sink.apply(write.kind, rows_of(write))
                in_flight[write.write_id] = (write, write.kind, applied)
            finished = not readable and not in_flight and core.sequencer.idle
            if finished and all(not lane.staged and lane.idle for lane in core.lanes.values()):
                assert Counter(sink.rows) == Counter(expected)
                return
    pytest.fail("did not finish")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 3),
    steps=st.integers(1, 40),
    crash_rate=st.sampled_from([0.0, 0.005, 0.02]),
    forget_rate=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_sink_ends_exact_over_any_crashes(
    seed: int, lanes: int, steps: int, crash_rate: float, forget_rate: float
) -> None:
    run(seed, lanes, steps, crash_rate, forget_rate)


def _core(partitions: tuple[Partition, ...], lanes: int = 2) -> AssignmentCore:
    want = Collection(7, 1, "default", "c", b"", lanes, 0, 1, partitions=partitions)
    core = AssignmentCore(
        want,
        [
            Lane(f"v{i}", f"p{i}", read_from=b"", resolved_ts=0, horizon_ts=10**6, closed=False)
            for i in range(lanes)
        ],
        WriteLimits(),
        partition_key=False,
    )
    core.mark_opened(0)
    return core


def _insert(ts: int, order: int, partition_id: int, key: int = 1) -> LogOp:
    return LogOp(
        Rank.INSERT,
        ts,
        order,
        position(order),
        ("row", key),
        size=10,
        rows=1,
        partition_id=partition_id,
        load_keys=lambda: frozenset({key}),
    )


def _drop(ts: int, order: int, partition_id: int, name: str) -> LogOp:
    return LogOp(
        Rank.MARKER, ts, order, position(order), "drop", partition_id=partition_id, partition=name
    )


def test_a_partition_drop_waits_for_every_lane_and_every_row_before_it() -> None:
    core = _core((Partition(1, "_default", 0), Partition(2, "p", 0)))
    first, second = core.lanes.values()
    first.add(_insert(5, 0, 2))
    first.add(_drop(10, 1, 2, "p"))
    first.tick(12, position(2))
    [write] = core.step()
    assert isinstance(write, StartWrite)
    second.tick(4, position(0))
    core.write_done(write.write.write_id)
    assert core.step() == [], "the other lane has not reached it"
    second.add(_drop(10, 1, 2, "p"))
    second.tick(12, position(2))
    assert core.step() == [DropPartition(2, "p", 10)]
    core.partition_dropped(2)
    assert core.step() == []
    assert first.resolved_ts == second.resolved_ts == 12


def _drop_ahead(
    resolved_ts: tuple[int, int],
    drop_ts: int,
    again_ts: int = 0,
) -> AssignmentCore:
    """Of an owner that begins when the metadata shows a drop that the log has yet to bring; its
    name was given anew.
    """
    partitions = (
        Partition(1, "_default", 0),
        Partition(2, "p", 0, ObjectState.DROPPED, drop_ts),
        Partition(3, "p", again_ts or drop_ts + 1),
    )
    want = Collection(7, 1, "default", "c", b"", 2, 0, 1, partitions=partitions)
    core = AssignmentCore(
        want,
        [
            Lane(
                f"v{i}",
                f"p{i}",
                read_from=b"",
                resolved_ts=resolved_ts[i],
                horizon_ts=10**6,
                closed=False,
            )
            for i in range(2)
        ],
        WriteLimits(),
        partition_key=False,
    )
    core.mark_opened(0)
    return core


def test_an_owner_that_begins_between_a_drop_and_its_message_carries_it_out() -> None:
    """Else the rows of the old partition stay, and count as those of the one that has its name."""
    core = _drop_ahead((5, 6), drop_ts=10)
    for order, lane in enumerate(core.lanes.values()):
        lane.add(_drop(10, order, 2, "p"))
        lane.tick(12, position(order + 1))
    assert core.step() == [DropPartition(2, "p", 10)]
    core.partition_dropped(2)
    assert core.step() == [CreatePartition(3, "p", 11)]
    assert [lane.resolved_ts for lane in core.lanes.values()] == [12, 12]


@pytest.mark.parametrize("drop_ts", [10, 0])
def test_a_drop_whose_message_is_later_than_the_metadata_says_is_ahead(drop_ts: int) -> None:
    """A tick lies between: Milvus stamps the message when it sends it, 49 ms later in the vectors.
    Where the metadata was not read in between, it does not say when.
    """
    core = _drop_ahead((12, 13), drop_ts=drop_ts, again_ts=20)
    for order, lane in enumerate(core.lanes.values()):
        lane.add(_drop(15, order, 2, "p"))
        lane.tick(16, position(order + 1))
    assert core.step() == [DropPartition(2, "p", 15)]
    core.partition_dropped(2)
    assert core.step() == [CreatePartition(3, "p", 20)]
    assert [lane.resolved_ts for lane in core.lanes.values()] == [16, 16]


def test_a_drop_long_ago_is_behind() -> None:
    long_ago = ms_to_tso(60_000)
    core = _drop_ahead((10 + long_ago, 10 + long_ago), drop_ts=10, again_ts=20 + long_ago)
    for lane in core.lanes.values():
        lane.horizon_ts = 10 * long_ago
    first, _ = core.lanes.values()
    first.add(_insert(30 + long_ago, 0, 3))
    first.tick(31 + long_ago, position(1))
    assert [type(effect) for effect in core.step()] == [StartWrite]


def test_a_drop_that_a_checkpoint_has_passed_is_not_carried_out_again() -> None:
    """The name is the next one's, with rows that no replay would bring again."""
    core = _drop_ahead((5, 11), drop_ts=10)
    first, _ = core.lanes.values()
    first.add(_drop(10, 0, 2, "p"))
    first.tick(12, position(1))
    assert core.step() == []
    assert first.resolved_ts == 12


def test_what_was_dropped_before_the_first_checkpoint_is_not_ours_to_drop() -> None:
    """The sink's partition of that name may be an adopted one."""
    core = _drop_ahead((0, 0), drop_ts=10)
    for order, lane in enumerate(core.lanes.values()):
        lane.add(_drop(10, order, 2, "p"))
        lane.tick(12, position(order + 1))
    assert core.step() == []


def test_a_part_stands_before_a_partitions_drop_and_leaves_it_to_others() -> None:
    core = _core((Partition(1, "_default", 0), Partition(2, "p", 0)))
    core.part = True
    first, second = core.lanes.values()
    first.add(_insert(5, 0, 2))
    first.add(_drop(10, 1, 2, "p"))
    first.add(_insert(11, 2, 1))
    first.tick(12, position(3))
    [write] = core.step()
    assert isinstance(write, StartWrite)
    second.add(_drop(10, 0, 2, "p"))
    second.tick(12, position(1))
    assert (core.step(), core.stands_ts) == ([], 0)
    core.write_done(write.write.write_id)
    assert (core.step(), core.stands_ts) == ([], 10)
    assert (first.resolved_ts, second.resolved_ts, len(first.staged)) == (0, 0, 2)


def test_a_part_stands_before_the_drop_of_a_partition_that_only_others_have_heard_of() -> None:
    """They made it, and wrote rows: a checkpoint beyond the drop would say that it is done."""
    core = _core((Partition(1, "_default", 0),), lanes=1)
    core.part = True
    [lane] = core.lanes.values()
    lane.add(_drop(10, 0, 2, "p"))
    lane.add(_insert(11, 1, 1))
    lane.tick(12, position(2))
    assert (core.step(), core.stands_ts) == ([], 10)
    assert (lane.resolved_ts, len(lane.staged)) == (0, 2)


def test_a_part_that_hears_late_of_a_partition_writes_nothing_for_the_next_of_its_name() -> None:
    """The sink's still has the rows of the old one, which others made."""
    core = _core((Partition(1, "_default", 0),), lanes=1)
    core.part = True
    [lane] = core.lanes.values()
    lane.tick(5, position(0))
    again = (Partition(2, "p", 0, ObjectState.DROPPED, 10), Partition(3, "p", 11))
    core.update(replace(core.want, partitions=(*core.want.partitions, *again)))
    lane.add(_insert(12, 0, 3))
    lane.add(_drop(13, 1, 2, "p"))
    lane.tick(14, position(2))
    assert (core.step(), core.stands_ts) == ([], 12)
    assert (lane.resolved_ts, len(lane.staged)) == (5, 2)


def test_a_part_stands_before_a_drop_that_came_behind_its_tick_beyond_its_checkpoint() -> None:
    core = _core((Partition(1, "_default", 0), Partition(2, "p", 0)), lanes=1)
    core.part = True
    [lane] = core.lanes.values()
    lane.tick(20, position(1))
    assert lane.resolved_ts == 20
    for _ in range(2):  # what is behind a tick is read again
        lane.add(_drop(10, 2, 2, "p"))
        lane.tick(30, position(3))
        lane.take_reread()
    assert (core.step(), core.stands_ts) == ([], 21)
    assert (lane.late, lane.resolved_ts, len(lane.staged)) == (1, 20, 1)


def test_a_part_makes_no_room_for_a_name_that_was_given_anew() -> None:
    core = _core((Partition(1, "_default", 0), Partition(2, "p", 0)), lanes=1)
    core.part = True
    [lane] = core.lanes.values()
    again = (Partition(2, "p", 0, ObjectState.DROPPED, 10), Partition(3, "p", 11))
    core.update(replace(core.want, partitions=(*core.want.partitions[:1], *again)))
    lane.add(_insert(12, 0, 3))
    lane.tick(13, position(1))
    assert (core.step(), core.stands_ts) == ([], 12)
    assert len(lane.staged) == 1


def test_rows_before_a_collections_drop_get_their_horizon() -> None:
    """An owner that catches up reads the drop together with rows that still have to be granted."""
    core = _core((Partition(1, "_default", 0),), lanes=1)
    [lane] = core.lanes.values()
    lane.horizon_ts = 4
    drop = LogOp(Rank.MARKER, 10, 1, position(1), "drop", drops_collection=True)
    lane.add(_insert(5, 0, 1))
    lane.add(drop)
    lane.tick(12, position(2))
    assert lane.ended
    assert core.step() == []
    core.grant("v0", core.wanted_horizon(lane))
    [write] = core.step()
    assert isinstance(write, StartWrite)
    core.write_done(write.write.write_id)
    assert core.step() == []
    assert core.closed
    assert core.wanted_horizon(lane) == 0


def test_rows_of_an_unknown_partition_wait_and_rows_of_a_dropped_one_are_counted() -> None:
    core = _core((Partition(1, "_default", 0),), lanes=1)
    [lane] = core.lanes.values()
    lane.add(_insert(5, 0, 9))
    lane.tick(6, position(1))
    assert core.step() == [QueryPartition(9)]
    assert core.step() == []
    assert lane.resolved_ts == 0
    gone = Partition(9, "p", 3, ObjectState.DROPPED, 8)
    core.update(replace(core.want, partitions=(*core.want.partitions, gone)))
    assert core.step() == []
    assert core.counters.rows_skipped == 1
    assert lane.resolved_ts == 6


def test_a_name_given_anew_gets_its_own_partition() -> None:
    """Drop p and create p again; rows of the new one lie before the old one's drop message."""
    core = _core((Partition(1, "_default", 0), Partition(2, "p", 0)), lanes=1)
    [lane] = core.lanes.values()
    lane.add(_insert(5, 0, 3))
    lane.add(_drop(7, 1, 2, "p"))
    lane.tick(9, position(2))
    core.update(
        replace(
            core.want,
            partitions=(
                Partition(1, "_default", 0),
                Partition(2, "p", 0, ObjectState.DROPPED, 4),
                Partition(3, "p", 4),
            ),
        )
    )
    assert core.step() == [DropPartition(2, "p", 4)]
    core.partition_dropped(2)
    assert core.step() == [CreatePartition(3, "p", 4)]
    core.partition_created(3)
    [write] = core.step()
    assert isinstance(write, StartWrite)
    assert write.write.partition == "p"
    core.write_done(write.write.write_id)
    assert core.step() == [], "the old drop message finds its partition gone and drops nothing"
    assert lane.resolved_ts == 9
