"""Sinks that take changes in order: with the checkpoint kept beside the rows each change takes
effect once, whatever is interrupted wherever; without, the last event of each key is the truth.

The log is that of `test_assignment_crashes`, the core is the shipped one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.model import Collection, Partition
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Mark, Rank
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.effects import StartWrite
from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.core.sequencer import Sequencer, WriteLimits

from tests.unit.replicator.test_assignment_crashes import Entry, Stored, make_log, position

LIVES = 200
Event = tuple[str, int, int, str]
"""(vchannel, timestamp, key, value); a deletion has no value."""


@dataclass
class Ledger:
    """A sink that appends, and keeps the marks of what it has appended."""

    events: list[Event] = field(default_factory=list)
    marks: dict[str, Mark] = field(default_factory=dict)

    def append(self, write: Write, vchannels: dict[int, str]) -> None:
        for op in write.ops:
            entry: Entry = op.payload
            for key, value in entry.rows:
                self.events.append(
                    (vchannels[key], op.ts, key, "" if op.rank is Rank.DELETE else value)
                )
        self.marks.update(write.marks)

    @property
    def state(self) -> dict[int, str]:
        state = {key: value for _, _, key, value in self.events}
        return {key: value for key, value in state.items() if value}


def expected_events(logs: dict[str, list[Entry]]) -> dict[str, list[Event]]:
    """What an uninterrupted reader tells of each vchannel, by time."""
    told: dict[str, list[Event]] = {}
    for vchannel, entries in logs.items():
        upserts = {entry.ts for entry in entries if entry.kind == "insert"}
        events = [
            (vchannel, entry.ts, key, value if entry.kind == "insert" else "")
            for entry in entries
            if entry.kind == "insert" or (entry.kind == "delete" and entry.ts not in upserts)
            for key, value in entry.rows
        ]
        told[vchannel] = sorted(events, key=lambda event: event[1])
    return told


def split(rng: random.Random, log: list[Entry]) -> list[Entry]:
    """Some inserts as two messages of one request, as Milvus cuts them by partition and size."""
    out: list[Entry] = []
    for entry in log:
        if entry.kind == "insert" and len(entry.rows) > 1 and rng.random() < 0.5:
            out += [replace(entry, rows=entry.rows[:1]), replace(entry, rows=entry.rows[1:])]
        else:
            out.append(entry)
    return out


def run(
    seed: int,
    lanes: int,
    steps: int,
    crash_rate: float,
    forget_rate: float,
    rebound_rate: float,
    limits: WriteLimits,
) -> None:
    rng = random.Random(seed)
    logs: dict[str, list[Entry]] = {}
    live: dict[int, str] = {}
    for index in range(lanes):
        log, alive = make_log(rng, index, lanes, steps)
        logs[f"p{index}_7v{index}"] = split(rng, log)
        live.update(alive)
    of_key = {key: f"p{key % lanes}_7v{key % lanes}" for key in range(40)}
    store = {v: Stored(position(0)) for v in logs}
    ledger = Ledger()
    want = Collection(
        7, 1, "default", "c", b"", lanes, 0, 1, partitions=(Partition(70, "_default", 1),)
    )
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
            WriteLimits(),
            partition_key=False,
        )
        core.sequencer.arrange(limits)
        if limits.atomic:
            for mark in ledger.marks.values():
                core.lanes[mark.vchannel].resume(mark.read_from, mark.resolved_ts)
        core.mark_opened(0)
        at = {v: int.from_bytes(lane.read_from, "little") for v, lane in core.lanes.items()}
        in_flight: dict[int, tuple[Write, bool]] = {}
        while True:
            if rng.random() < crash_rate and life < LIVES - 1:
                for write, applied in in_flight.values():
                    if not applied and rng.random() < 0.5:
                        ledger.append(write, of_key)
                break
            action = rng.random()
            readable = [v for v in logs if at[v] < len(logs[v])]
            if action < 0.4 and readable:
                v = rng.choice(readable)
                _read(core.lanes[v], logs[v][at[v]], at[v])
                at[v] += 1
                if core.lanes[v].may_forget and rng.random() < forget_rate:
                    core.lanes[v].forget(rng.choice((0, 20, 1_000)))
                if (again := core.lanes[v].take_reread()) is not None:
                    at[v] = int.from_bytes(again, "little")
            elif action < 0.7 and in_flight:
                write_id = rng.choice(list(in_flight))
                write, applied = in_flight.pop(write_id)
                if not applied:
                    ledger.append(write, of_key)
                core.write_done(write_id)
            elif action < 0.85:
                for v, lane in core.lanes.items():
                    assert lane.resolved_ts >= store[v].resolved_ts, "a checkpoint went back"
                    horizon = max(store[v].horizon_ts, core.wanted_horizon(lane))
                    store[v] = Stored(lane.read_from, lane.resolved_ts, horizon)
                    core.grant(v, horizon)
            elif core.sequencer.lingering:
                core.sequencer.hurry()
            if rng.random() < rebound_rate:
                lingers = rng.random() < 0.5
                core.sequencer.bound(
                    rng.choice((1, 3, 8)), rng.choice((1, 1 << 20)), lingers=lingers
                )
            for effect in core.step():
                assert isinstance(effect, StartWrite)
                assert effect.write.kind is WriteKind.CHANGES
                assert not (limits.atomic and in_flight), "two transactions at once"
                # A commit may be done long before anybody hears of it.
                applied = rng.random() < 0.5
                if applied:
                    ledger.append(effect.write, of_key)
                in_flight[effect.write.write_id] = (effect.write, applied)
            finished = not readable and not in_flight and core.sequencer.idle
            if finished and all(not lane.staged and lane.idle for lane in core.lanes.values()):
                assert ledger.state == live
                if limits.atomic:
                    for vchannel, events in expected_events(logs).items():
                        told = [event for event in ledger.events if event[0] == vchannel]
                        assert [e[1] for e in told] == [e[1] for e in events], "order or number"
                        assert sorted(told) == sorted(events)
                return
    pytest.fail("did not finish")


def _read(lane: Lane, entry: Entry, order: int) -> None:
    if entry.kind == "tick":
        lane.tick(entry.ts, position(order))
        return
    lane.add(
        LogOp(
            Rank.INSERT if entry.kind == "insert" else Rank.DELETE,
            entry.ts,
            order,
            position(order),
            entry,
            size=10,
            rows=len(entry.rows),
            partition_id=70 if entry.kind == "insert" else -1,
            load_keys=partial(frozenset, {key for key, _ in entry.rows}),
        )
    )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 3),
    steps=st.integers(1, 40),
    crash_rate=st.sampled_from([0.0, 0.005, 0.02]),
    forget_rate=st.sampled_from([0.0, 0.1, 1.0]),
    rebound_rate=st.sampled_from([0.0, 0.1]),
    atomic=st.booleans(),
    lingers=st.booleans(),
)
def test_in_order_over_any_crashes(
    seed: int,
    lanes: int,
    steps: int,
    crash_rate: float,
    forget_rate: float,
    rebound_rate: float,
    atomic: bool,
    lingers: bool,
) -> None:
    limits = WriteLimits(
        rows_per_request=8,
        bytes_per_request=1 << 20,
        in_flight=1 if atomic else 3,
        ordered=True,
        atomic=atomic,
        lingers=lingers,
    )
    run(seed, lanes, steps, crash_rate, forget_rate, rebound_rate, limits)


def test_inserts_of_one_key_wait_for_each_other() -> None:
    """A Milvus holds both rows; where the last one counts, the first must not come after it."""
    sequencer = Sequencer(WriteLimits(rows_per_request=1, in_flight=3, ordered=True))
    for order, key in enumerate((1, 2, 1)):
        sequencer.add(WriteKind.INSERT, "", insert_of(key, order))
    first, second = sequencer.start()
    assert (first.keys(), second.keys()) == ({1}, {2})
    sequencer.done(second.write_id)
    assert sequencer.start() == []
    sequencer.done(first.write_id)
    [third] = sequencer.start()
    assert third.keys() == {1}


def insert_of(key: int, order: int) -> LogOp:
    return LogOp(
        Rank.INSERT,
        order + 1,
        order,
        position(order),
        None,
        rows=1,
        load_keys=lambda: frozenset([key]),
    )
