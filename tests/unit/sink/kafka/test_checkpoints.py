"""The record that the sink keeps of a collection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.errors import BugError
from milvus_cdc.sink.kafka.checkpoints import Known, key_of, partition_of
from milvus_cdc.sink.writer import Checkpoint

from tests.contract.kafka_samples import table_named

TABLE = table_named("c", task_uid="u")

checkpoints = st.builds(
    Checkpoint, st.sampled_from(["a", "b", "ж"]), st.binary(max_size=40), st.integers(0, 2**63 - 1)
)


@given(st.integers(0, 2**62), st.booleans(), st.lists(checkpoints, max_size=6))
def test_what_is_written_is_read(epoch: int, announced: bool, news: list[Checkpoint]) -> None:
    known = Known(epoch, announced).with_checkpoints(tuple(news))
    assert Known.decode(known.encode(TABLE)) == known
    for name, each in known.checkpoints.items():
        assert each.resolved_ts == max(c.resolved_ts for c in news if c.vchannel == name)


def test_no_vchannel_goes_back_and_others_stay() -> None:
    known = Known(1).with_checkpoints((Checkpoint("a", b"5", 5), Checkpoint("b", b"7", 7)))
    again = known.with_checkpoints((Checkpoint("a", b"4", 4), Checkpoint("b", b"8", 8)))
    assert again.checkpoints == {"a": Checkpoint("a", b"5", 5), "b": Checkpoint("b", b"8", 8)}


@pytest.mark.parametrize("value", [b"", b"x", b"[]", b"{}", b'{"epoch":1,"announced":true}'])
def test_a_record_of_somebody_else(value: bytes) -> None:
    with pytest.raises(BugError, match="CHECKPOINT_UNREADABLE"):
        Known.decode(value)


def test_a_collection_has_one_place() -> None:
    assert key_of(TABLE) == b"u/7"
    # Stored data depends on it.
    assert [partition_of(b"u/%d" % n, 16) for n in range(4)] == [8, 14, 4, 2]
    assert len({partition_of(b"u/%d" % n, 16) for n in range(500)}) == 16
