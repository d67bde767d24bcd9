"""How often a sink should hold a key, against a sink that is simply asked."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.order.ops import LogOp, Rank
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.ops import WriteKind
from milvus_cdc_replicator.core.tally import KEY_BYTES, WAITING_BYTES, Tally

KEYS = st.frozensets(st.integers(0, 5), min_size=1, max_size=3)
OPS = st.tuples(st.sampled_from(WriteKind), st.sampled_from("pq"), KEYS, st.booleans())


def _op(keys: frozenset[int], rows: int = 0) -> LogOp:
    return LogOp(
        Rank.INSERT, 1, 1, b"", None, rows=rows or len(keys), load_keys=lambda: frozenset(keys)
    )


def _tally(memory: int = 1 << 20, *, named: bool = True) -> Tally:
    return Tally(Budget(memory).set_aside, named=named)


def _all(tally: Tally) -> dict[tuple[str, int | str], int]:
    return {
        (partition, key): copies
        for partition, keys in tally.chunks(2)
        for key, copies in tally.expected(partition, keys).items()
    }


@settings(deadline=None)
@given(st.lists(OPS, max_size=12), st.lists(OPS, max_size=12))
def test_it_knows_what_a_sink_holds(
    window: list[tuple[WriteKind, str, frozenset[int], bool]],
    later: list[tuple[WriteKind, str, frozenset[int], bool]],
) -> None:
    tally = _tally()
    # Before the window the sink holds anything; each key of it is written anew there.
    sink = {"p": [0, 1, 2], "q": [0, 3]}
    for at, (kind, partition, keys, anywhere) in enumerate(window + later):
        if kind is WriteKind.CHANGES:
            continue
        in_window = at < len(window)
        if in_window and kind is WriteKind.INSERT:
            kind = WriteKind.UPSERT
        if kind is WriteKind.DELETE and anywhere:
            partition = ""
        tally.took(kind, partition, _op(keys), window=in_window)
        for name in [partition] if partition else list(sink):
            if kind is not WriteKind.INSERT:
                sink[name] = [key for key in sink[name] if key not in keys]
            if kind is not WriteKind.DELETE:
                sink[name] += keys
    for (partition, key), copies in _all(tally).items():
        assert sink[partition].count(int(key)) == copies
    for kind, partition, keys, _ in window:
        if kind in (WriteKind.INSERT, WriteKind.UPSERT):
            known = dict(tally.chunks(99)).get(partition, [])
            assert keys <= set(known), "nothing that a lost owner may write is forgotten"


@settings(deadline=None)
@given(
    st.lists(OPS, max_size=12),
    st.lists(OPS, max_size=12),
    st.lists(st.booleans(), max_size=40),
)
def test_what_is_read_beside_what_goes_on_comes_before_it(
    before: list[tuple[WriteKind, str, frozenset[int], bool]],
    now: list[tuple[WriteKind, str, frozenset[int], bool]],
    turns: list[bool],
) -> None:
    def take(tally: Tally, at: int) -> None:
        kind, partition, keys, window = now[at]
        if kind is WriteKind.CHANGES:
            tally.forget(list(keys)[:1])
        elif keys == frozenset({0}):
            tally.forget_partition(partition)
        else:
            tally.took(kind, partition, _op(keys), window=window)

    def recall(tally: Tally, at: int) -> None:
        kind, partition, keys, _ = before[at]
        if kind is not WriteKind.CHANGES:
            tally.took_before(kind, partition, _op(keys))

    ordered, budget = _tally(), Budget(1 << 20)
    for at in range(len(before)):
        recall(ordered, at)
    for at in range(len(now)):
        take(ordered, at)
    beside = Tally(budget.set_aside, named=True)
    beside.await_past()
    left_before, left_now = list(range(len(before))), list(range(len(now)))
    for past in turns:
        if past and left_before:
            recall(beside, left_before.pop(0))
        elif left_now:
            take(beside, left_now.pop(0))
    for at in left_before:
        recall(beside, at)
    beside.past_read()
    for at in left_now:
        take(beside, at)
    assert _all(beside) == _all(ordered)
    beside.clear()
    assert budget.held == 0


def test_what_waits_for_the_past_has_its_bounds_too() -> None:
    budget = Budget(4 * (KEY_BYTES * 3 + 2 * WAITING_BYTES))
    tally = Tally(budget.set_aside, named=True)
    tally.await_past()
    tally.took(WriteKind.INSERT, "p", _op(frozenset({1, 2, 3})), window=False)
    tally.forget([1])
    assert budget.held == 3 * KEY_BYTES + 2 * WAITING_BYTES
    tally.took(WriteKind.INSERT, "p", _op(frozenset({4})), window=False)
    assert tally.full
    assert budget.held == 0
    tally.past_read()
    assert not _all(tally)


def test_what_the_source_doubles_and_the_sink_refuses_is_left_out() -> None:
    tally = _tally()
    tally.took(WriteKind.UPSERT, "p", _op(frozenset({1, 2, 3, 4})), window=True)
    tally.took(WriteKind.INSERT, "p", _op(frozenset({2})), window=False)
    tally.took(WriteKind.DELETE, "p", _op(frozenset({3})), window=False)
    tally.took(WriteKind.INSERT, "p", _op(frozenset({3}), rows=2), window=False)
    tally.forget([4, 9])
    assert _all(tally) == {("p", 1): 1}


def test_a_dropped_partition_is_forgotten() -> None:
    tally = _tally()
    tally.took(WriteKind.UPSERT, "p", _op(frozenset({1})), window=True)
    tally.took(WriteKind.UPSERT, "q", _op(frozenset({1})), window=True)
    tally.forget_partition("p")
    assert _all(tally) == {("q", 1): 1}


def test_without_names_of_partitions_deleted_keys_count_too() -> None:
    tally = _tally(named=False)
    tally.took(WriteKind.UPSERT, "", _op(frozenset({1, 2})), window=True)
    tally.took(WriteKind.DELETE, "", _op(frozenset({2, 3})), window=True)
    assert _all(tally) == {("", 1): 1, ("", 2): 0, ("", 3): 0}


def test_it_gives_up_without_room_and_gives_its_memory_back() -> None:
    budget = Budget(4 * KEY_BYTES * 3)
    tally = Tally(budget.set_aside, named=True)
    tally.took(WriteKind.UPSERT, "p", _op(frozenset({1, 2, 3})), window=True)
    assert budget.held == 3 * KEY_BYTES
    tally.took(WriteKind.UPSERT, "p", _op(frozenset({4})), window=True)
    assert tally.full
    assert budget.held == 0
    tally.took(WriteKind.UPSERT, "p", _op(frozenset({1})), window=True)
    assert not _all(tally)
