"""What is read to recount keys while rows go on."""

from __future__ import annotations

from milvus_cdc.order.lane import Lane
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.past import Past
from milvus_cdc_replicator.core.tally import Tally

from tests.unit.replicator.test_assignment_crashes import _drop, _drop_ahead, _insert, position


def test_rows_that_an_owner_before_dropped_are_not_recounted() -> None:
    """The metadata may leave open if that drop is still ahead; and of another shard they are read
    after it.
    """
    core = _drop_ahead((12, 13), drop_ts=10, again_ts=20)
    core.tally = Tally(Budget(1 << 20).set_aside, named=True)
    lanes = [
        Lane(v, v, read_from=b"", resolved_ts=0, horizon_ts=0, closed=False) for v in core.lanes
    ]
    past = Past(lanes, {"v0": 12, "v1": 13}, core.took_before)
    for ts, lane in enumerate(lanes, 1):
        lane.add(_insert(ts, 0, 1, key=10 + ts))
        lane.add(_insert(ts, 1, 2, key=ts))
        past.step()
        lane.add(_drop(11, 2, 2, "p"))
        lane.tick(14, position(3))
        past.step()
    assert past.over
    assert {name: set(keys) for name, keys in core.tally.chunks(9)} == {"_default": {11, 12}}
