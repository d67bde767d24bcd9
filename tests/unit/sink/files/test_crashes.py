"""Whatever a life of an owner ends with, and whoever goes on: each change is published once."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from milvus_cdc.errors import RetryableError
from milvus_cdc.rows import ChangeOp, Changes
from milvus_cdc.sink.files import places
from milvus_cdc.sink.files.encode import Parquet
from milvus_cdc.sink.files.orphans import remove_orphans
from milvus_cdc.sink.files.publishing import Published
from milvus_cdc.sink.files.reading import History, find_collections
from milvus_cdc.sink.files.store import Bytes
from milvus_cdc.sink.writer import Batch, Checkpoint, Opening, SchemaChange, SchemaChangeKind
from milvuscdc.v1 import sink_file_pb2

from tests.unit.sink.files.memory_store import Crash, Fault, MemoryStore
from tests.unit.sink.files.samples import BEGIN, V1, V2, events, gone, numbers, plain, put, table_of

TABLE = table_of()
PARQUET = Parquet(sink_file_pb2.ParquetFiles())
NAMES = ("", "p", "q")


def content(changes: list[Changes]) -> Bytes:
    return PARQUET.content(TABLE, changes)


@st.composite
def streams(draw: st.DrawFn) -> list[Changes]:
    """What the source does, in the order of its timestamps; some of them are shared."""
    made = []
    at = 0
    for order in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from((0, 1, 1, 40_000_000_000_000)))
        vchannel = draw(st.sampled_from((V1, V2)))
        keys = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        kind = draw(st.sampled_from(tuple(ChangeOp)))
        if kind is ChangeOp.DELETE:
            each = gone(keys, at, partition=draw(st.sampled_from(NAMES)), vchannel=vchannel)
        else:
            named = draw(st.sampled_from(NAMES[1:]))
            each = put(TABLE, plain(keys, order), at, op=kind, partition=named, vchannel=vchannel)
        object.__setattr__(each, "order", order)
        made.append(each)
    return made


def model(stream: list[Changes]) -> dict[tuple[str, int], int]:
    """`n` by partition and key."""
    rows: dict[tuple[str, int], int] = {}
    for each in stream:
        for key in each.keys(TABLE):
            if each.op is not ChangeOp.DELETE:
                rows[each.partition, int(key)] = each.order
                continue
            for name in [each.partition] if each.partition else NAMES:
                rows.pop((name, int(key)), None)
    return rows


def after(stream: list[Changes], checkpoints: tuple[Checkpoint, ...]) -> list[Changes]:
    """What a reader delivers to a new owner."""
    known = {each.vchannel: each.resolved_ts for each in checkpoints}
    return [each for each in stream if each.ts > known.get(each.vchannel, 0)]


def reached(done: list[Changes], left: list[Changes]) -> tuple[Checkpoint, ...]:
    """The furthest place of each vchannel between the two."""
    found = []
    for vchannel in (V1, V2):
        ahead = min((each.ts for each in left if each.vchannel == vchannel), default=math.inf)
        behind = [each.ts for each in done if each.vchannel == vchannel and each.ts < ahead]
        if behind:
            found.append(Checkpoint(vchannel, str(max(behind)).encode(), max(behind)))
    return tuple(found)


def history_in(store: MemoryStore) -> History:
    [found] = find_collections(store)
    return found.history()


def visible(store: MemoryStore) -> int:
    return sum(path.endswith(".parquet") for path in store.objects)


def written_at_last(owner: Published, batch: Batch) -> None:
    for _ in range(70):
        try:
            return owner.write(TABLE, batch, content, math.inf)
        except RetryableError as error:
            if error.reason == "SINK_FENCED":
                pytest.fail("by whom?")
    pytest.fail("the faults do not end")


faults = st.lists(
    st.one_of(st.none(), st.none(), st.sampled_from(tuple(Fault))), min_size=0, max_size=60
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(stream=streams(), troubles=faults, cuts=st.data())
def test_each_change_is_published_once(
    stream: list[Changes], troubles: list[Fault | None], cuts: st.DataObject
) -> None:
    store = MemoryStore()
    store.faults = troubles
    owners: list[Published] = []
    epoch = 0
    while True:
        epoch += 1
        opening = Opening.RESUME if owners else Opening.NEW
        try:
            owner = Published.open(store, TABLE, opening, epoch, "parquet")
            owners.append(owner)
            remove_orphans(store, owner.folder, owner.chain, owner.head)
            left = after(stream, owner.head.checkpoints)
            done = [each for each in stream if each not in left]
            while left:
                count = cuts.draw(st.integers(1, len(left)), label="rows of a batch")
                now, left = left[:count], left[count:]
                done += now
                say = cuts.draw(st.booleans(), label="with checkpoints")
                batch = Batch(tuple(now), reached(done, left) if say else ())
                for _ in range(1 + cuts.draw(st.integers(0, 1), label="sent again")):
                    written_at_last(owner, batch)
                if epoch < 6 and cuts.draw(st.booleans(), label="killed"):
                    raise Crash
            break
        except (Crash, RetryableError):
            continue
    store.faults = []
    # Those who came before may wake up any time.
    for old in owners[:-1]:
        with pytest.raises(RetryableError, match="SINK_FENCED"):
            old.write(TABLE, Batch((put(TABLE, plain([9]), 10**15),)), content, math.inf)
    published = history_in(store)
    expected = [
        (each.op.value, int(key), each.ts - BEGIN) for each in stream for key in each.keys(TABLE)
    ]
    assert sorted(events(published)) == sorted(expected)
    found = {(row["_partition"], row["id"]): row["n"] for row in published.state().to_pylist()}
    assert found == model(stream)
    # In portions of a few keys it is the same.
    few = [row for each in published.rows(published.masks(300)) for row in each.to_pylist()]
    assert {(row["_partition"], row["id"]): row["n"] for row in few} == found
    assert len(few) == len(found)
    # By path alone: nothing but what is published, once somebody has opened it again.
    last = Published.open(store, TABLE, Opening.RESUME, epoch + 1, "parquet")
    remove_orphans(store, last.folder, last.chain, last.head)
    assert visible(store) == len(published.files)
    with pytest.raises(RetryableError, match="SINK_FENCED"):
        owners[-1].write(TABLE, Batch((put(TABLE, plain([9]), 10**15),)), content, math.inf)


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("call", range(2))
def test_a_schema_change_is_recorded_once(fault: Fault, call: int) -> None:
    store = MemoryStore()
    owner = Published.open(store, TABLE, Opening.NEW, 1, "parquet")
    rows = Batch((put(TABLE, plain([1]), 1, partition="p"), put(TABLE, plain([2]), 1)))
    owner.write(TABLE, rows, content, math.inf)
    drop = SchemaChange(SchemaChangeKind.DROP_PARTITION, TABLE, "p")
    store.faults = [*[None] * call, fault]
    for epoch in range(2, 9):
        try:
            owner.apply(drop)
            break
        except RetryableError:
            continue
        except Crash:
            owner = Published.open(store, TABLE, Opening.RESUME, epoch, "parquet")
    store.faults = []
    owner.write(TABLE, Batch((put(TABLE, plain([3]), 4, partition="p"),)), content, math.inf)
    assert [event.kind for _, event in history_in(store).events] == ["DROP_PARTITION"]
    assert numbers(history_in(store)) == {2: 0, 3: 0}


def test_a_file_of_a_late_attempt_is_another_file() -> None:
    """The store may carry out a PUT after its answer was given up."""
    store = MemoryStore()
    owner = Published.open(store, TABLE, Opening.NEW, 1, "parquet")
    store.faults = [Fault.LATE]
    with pytest.raises(RetryableError):
        owner.write(TABLE, Batch((put(TABLE, plain([1]), 1),)), content, math.inf)
    more = Batch((put(TABLE, plain([1]), 1), put(TABLE, plain([2]), 2)))
    owner.write(TABLE, more, content, math.inf)
    [file] = history_in(store).files
    assert places.part_of(file.entry.path) is not None
    assert numbers(history_in(store)) == {1: 0, 2: 0}
    assert visible(store) == 1


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.LOST_ANSWER, Fault.LATE])
def test_a_manifest_of_unknown_fate(fault: Fault) -> None:
    """Its file stays while the manifest may still name it, and no longer."""
    store = MemoryStore()
    owner = Published.open(store, TABLE, Opening.NEW, 1, "parquet")
    store.faults = [None, fault]
    with pytest.raises(RetryableError):
        owner.write(TABLE, Batch((put(TABLE, plain([1]), 1),)), content, math.inf)
    assert visible(store) == (0 if fault is Fault.FAIL else 1)
    more = Batch((put(TABLE, plain([1]), 1), put(TABLE, plain([2]), 2)))
    owner.write(TABLE, more, content, math.inf)
    assert numbers(history_in(store)) == {1: 0, 2: 0}
    assert visible(store) == len(history_in(store).files)
