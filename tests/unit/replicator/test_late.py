"""Messages behind a tick that covers them take effect by their timestamps, whoever takes over."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.late import STEP, History
from milvus_cdc.order.ops import Key, LogOp, Rank
from milvus_cdc_replicator.core.past import Past

from tests.unit.replicator.test_assignment_crashes import position

TICK_EVERY = 30
FAR = 2**62


@dataclass(frozen=True)
class Said:
    """One message of the log; `rank` None = a tick."""

    ts: int
    rank: Rank | None = None
    keys: tuple[int, ...] = ()
    number: int = 0
    """Of the request, and the value that it writes."""
    partition_id: int = -1


def op_of(said: Said, at: int) -> LogOp:
    assert said.rank is not None
    made = LogOp(
        said.rank,
        said.ts,
        at,
        position(at),
        said,
        size=10,
        rows=len(said.keys),
        load_keys=partial(frozenset, said.keys),
        partition_id=said.partition_id,
        msg_id=said.number,
    )

    def restrict(keys: frozenset[Key]) -> LogOp:
        return op_of(replace(said, keys=tuple(k for k in said.keys if k in keys)), at)

    made.restrict = restrict
    return made


def make_log(rng: random.Random, requests: int, *, in_order: bool) -> list[Said]:
    """Upserts write their insert first, then their delete, as Milvus does; a key that was deleted,
    from wherever it was, may come back in another partition. `in_order`: what is said of a key
    stands in the order of time, as with any client that waits for its answers.
    """
    said: list[tuple[float, Said]] = []
    alive: dict[int, int] = {}
    dead: list[int] = []
    last: dict[int, float] = {}
    new = 0
    for number in range(1, requests + 1):
        ts = number * 10
        partition_id = rng.choice((1, 2))
        here = [key for key, there in alive.items() if there == partition_id]
        kind = rng.choice(("insert", "return", "upsert", "upsert", "delete"))
        if kind == "delete" and alive:
            partition_id = -1
            keys = tuple(rng.sample(sorted(alive), min(len(alive), rng.randint(1, 4))))
            dead += keys
            alive = {key: there for key, there in alive.items() if key not in keys}
        elif kind == "upsert" and here:
            keys = tuple(rng.sample(here, min(len(here), rng.randint(1, 4))))
        else:
            if kind == "return" and dead:
                keys = (dead.pop(rng.randrange(len(dead))),)
            else:
                keys = tuple(range(new, new := new + rng.randint(1, 3)))
            kind = "insert"
            alive.update(dict.fromkeys(keys, partition_id))
        ranks = {"insert": [Rank.INSERT], "upsert": [Rank.INSERT, Rank.DELETE]}
        place = float(ts)
        for rank in ranks.get(kind, [Rank.DELETE]):
            if rng.random() < 0.4:
                place += rng.choice((0, 5, 35, 90))
            if in_order:
                place = max([place, *(last.get(key, 0) for key in keys)])
            place += 0.001
            last.update(dict.fromkeys(keys, place))
            said.append((place, Said(ts, rank, keys, number, partition_id)))
    end = int(max(place for place, _ in said)) + 2 * TICK_EVERY
    said += [(t + 0.5, Said(t)) for t in range(TICK_EVERY, end, TICK_EVERY)]
    return [each for _, each in sorted(said, key=lambda pair: pair[0])]


def truth(log: list[Said]) -> dict[int, list[int]]:
    """As Milvus has it: a delete removes what is older than itself, wherever it stands."""
    rows: dict[int, list[int]] = {}
    for said in log:
        for key in said.keys if said.rank is Rank.INSERT else ():
            gone = (d for d in log if d.rank is Rank.DELETE and key in d.keys)
            if not any(d.ts > said.ts and _reaches(d, said.partition_id) for d in gone):
                rows.setdefault(key, []).append(said.number)
    return rows


def _reaches(delete: Said, partition_id: int) -> bool:
    return delete.partition_id in (-1, partition_id)


class Sink:
    """Does one after the other, and stores a key twice where it is inserted twice, or upserted into
    another partition.
    """

    def __init__(self) -> None:
        self.copies: dict[int, list[Said]] = {}

    @property
    def rows(self) -> dict[int, list[int]]:
        return {key: [said.number for said in copies] for key, copies in self.copies.items()}

    def take(self, op: LogOp, upsert_until_ts: int) -> None:
        for key in op.payload.keys:
            copies = self.copies.pop(key, [])
            if op.rank is Rank.DELETE or op.replaces or op.ts <= upsert_until_ts:
                copies = [row for row in copies if not _reaches(op.payload, row.partition_id)]
            if op.rank is Rank.INSERT:
                copies.append(op.payload)
            if copies:
                self.copies[key] = copies


class Owner:
    def __init__(self, read_from: bytes, resolved_ts: int, horizon_ts: int) -> None:
        self.lane = Lane(
            "v",
            "p",
            read_from=read_from,
            resolved_ts=resolved_ts,
            horizon_ts=horizon_ts,
            closed=False,
        )
        self.at = int.from_bytes(read_from, "little")
        self.unfinished: list[LogOp] = []

    def step(self, log: list[Said], sink: Sink, rng: random.Random, *, forget: bool) -> None:
        self.read(log, rng, forget=forget)
        while self.lane.staged:
            op = self.lane.take()
            sink.take(op, self.lane.upsert_until_ts)
            self.unfinished.append(op)
        while self.unfinished and rng.random() < 0.7:
            self.lane.durable(self.unfinished.pop(0))

    def read(self, log: list[Said], rng: random.Random, *, forget: bool) -> None:
        said = log[self.at]
        if said.rank is None:
            self.lane.tick(said.ts, position(self.at))
        else:
            self.lane.add(op_of(said, self.at))
        self.at += 1
        if forget and self.lane.may_forget and rng.random() < 0.3:
            self.lane.forget(25)
        if (again := self.lane.take_reread()) is not None:
            self.at = int.from_bytes(again, "little")


def halves_apart(log: list[Said], resolved_ts: int, at: int) -> bool:
    """A checkpoint here would stand between the two halves of one upsert, one of them late."""
    tick = next(n for n, s in enumerate(log) if s.rank is None and s.ts >= resolved_ts)
    before = {s.number for s in log[:tick] if s.ts <= resolved_ts}
    return bool(resolved_ts) and any(s.number in before and s.keys for s in log[tick:])


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 40),
    forget=st.booleans(),
    in_order=st.booleans(),
)
def test_the_sink_ends_as_the_source(
    seed: int, requests: int, forget: bool, in_order: bool
) -> None:
    rng = random.Random(seed)
    log = make_log(rng, requests, in_order=in_order)
    sink, owner = Sink(), Owner(position(0), 0, 0)
    while owner.at < len(log):
        owner.step(log, sink, rng, forget=forget)
    rows, want = sink.rows, truth(log)
    if not in_order:  # a source may double a key then, which a sink that replaces does not
        rows = {key: [max(values)] for key, values in rows.items()}
        want = {key: [max(values)] for key, values in want.items()}
    assert rows == want


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), requests=st.integers(1, 40), forget=st.booleans())
def test_whoever_takes_over(seed: int, requests: int, forget: bool) -> None:
    rng = random.Random(seed)
    log = make_log(rng, requests, in_order=True)
    sink, owner = Sink(), Owner(position(0), 0, 0)
    written_ts = 0
    while owner.at < len(log):
        owner.step(log, sink, rng, forget=forget)
        written_ts = max(written_ts, owner.lane.released_ts)
        resolved_ts = owner.lane.resolved_ts
        if rng.random() < 0.05 and not halves_apart(log, resolved_ts, owner.at):
            owner = Owner(owner.lane.read_from, resolved_ts, written_ts)
    assert sink.rows == truth(log)


@pytest.mark.parametrize(("checkpoint", "taken"), [(20, []), (21, [1]), (30, [1, 2])])
def test_a_recount_counts_of_what_came_late_what_the_checkpoint_covers(
    checkpoint: int, taken: list[int]
) -> None:
    """The rest is not at the sink yet, or this owner writes it."""
    log = [
        Said(20),
        Said(15, Rank.INSERT, (1,), 1),
        Said(25, Rank.INSERT, (2,), 2),
        Said(30),
        Said(35, Rank.INSERT, (3,), 3),
        Said(40),
    ]
    reader, heard = Owner(position(0), 0, 0), []
    past = Past([reader.lane], {"v": checkpoint}, lambda op: heard.append(op.payload.number))
    while not past.over:
        reader.read(log, random.Random(1), forget=False)
        past.step()
    assert heard == taken


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), requests=st.integers(1, 40), forget=st.booleans())
@example(seed=1107, requests=14, forget=True)  # all said anew, with half an upsert left out before
def test_past_and_present_are_the_whole(seed: int, requests: int, forget: bool) -> None:
    """Wherever the checkpoint stands, what is read before it for a recount and what is written
    from there on is what one owner writes from the start.
    """
    rng = random.Random(seed)
    log = make_log(rng, requests, in_order=True)
    owner = Owner(position(0), 0, 0)
    whole, sink = Sink(), Sink()
    stops = [(position(0), 0, 0)]
    while owner.at < len(log):
        owner.step(log, whole, rng, forget=forget)
        resolved_ts = owner.lane.resolved_ts
        if not halves_apart(log, resolved_ts, owner.at):
            stops.append((owner.lane.read_from, resolved_ts, owner.lane.released_ts))
    read_from, checkpoint, written_ts = rng.choice(stops)
    reader = Owner(position(0), 0, 0)
    past = Past([reader.lane], {"v": checkpoint}, partial(sink.take, upsert_until_ts=FAR))
    while checkpoint and not past.over:
        reader.read(log, rng, forget=forget)
        past.step()
    present = Owner(read_from, checkpoint, written_ts)
    while present.at < len(log):
        present.step(log, sink, rng, forget=forget)
    assert sink.rows == truth(log)


def test_halves_of_an_upsert_that_a_checkpoint_divides_are_one_where_all_is_said_anew() -> None:
    """Its insert was left out as done; the delete comes late, and by then nobody remembers of which
    keys late messages were.
    """
    log = [
        Said(25, Rank.INSERT, (9,), 1, 1),
        Said(18, Rank.INSERT, (7,), 2, 1),
        Said(20),
        Said(18, Rank.DELETE, (7,), 2, 1),
        Said(30),
    ]
    sink, owner = Sink(), Owner(position(0), 20, 20)
    sink.copies[7] = [log[1]]
    while owner.at < len(log):
        owner.read(log, random.Random(1), forget=False)
        if owner.at == 4 and owner.lane.may_forget and not owner.lane.forgetful:
            owner.lane.forget(1_000)
        while owner.lane.staged:
            sink.take(owner.lane.take(), owner.lane.upsert_until_ts)
    assert sink.rows == {7: [2], 9: [1]}


def test_a_late_deletion_reaches_partitions_that_what_is_newer_does_not() -> None:
    log = [
        Said(5, Rank.INSERT, (1, 2), 1, 1),
        Said(20),
        Said(10, Rank.DELETE, (1, 2), 2),
        Said(15, Rank.INSERT, (1,), 3, 2),
        Said(30),
    ]
    sink, owner = Sink(), Owner(position(0), 0, 0)
    while owner.at < len(log):
        owner.step(log, sink, random.Random(1), forget=False)
    assert sink.rows == {1: [3]}


def test_no_late_message_is_counted_where_ticks_keep_their_word() -> None:
    log = [each for each in make_log(random.Random(1), 40, in_order=True)]
    log.sort(key=lambda each: (each.ts, each.rank is None))
    owner = Owner(position(0), 0, 0)
    while owner.at < len(log):
        owner.step(log, Sink(), random.Random(1), forget=True)
    assert owner.lane.late == 0


def test_places_to_begin_at() -> None:
    history = History(0, b"start")
    for second in range(1, 300):
        history.add(second * STEP, b"%d" % second)
        history.add(second * STEP + STEP // 2, b"too near")
    assert history.before(299 * STEP) == b"298"
    assert history.before(250 * STEP + 1) == b"250"
    assert history.before(5) == b"180"
