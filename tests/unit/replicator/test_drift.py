"""What the comparison of a sink collection mends, tells and leaves, on a sink in memory."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import structlog
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.model import Carry, Collection, Drift, Partition, ms_to_tso
from milvus_cdc.sink import reconcile
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc_replicator import drift
from milvus_cdc_replicator.core.assignment import DROP_MARGIN_MS
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.drift import Reconciler, without_dropped
from milvus_cdc_replicator.gate import WriteGate, boottime
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.spec import Applied, CollectionAssignment
from milvuscdc.v1 import task_pb2

from tests.contract.sink_samples import LOADED, PLAIN, Sample, flat_index

SAMPLE = Sample("default", "c", PLAIN, partitions=("_default", "p1"))
V, N = flat_index(name="v1"), flat_index("n", name="n1")
WANT = SAMPLE.want(indexes=(V, N), load=LOADED)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ROUND_SECONDS", (0.0, 0.0))


class Bench:
    def __init__(self, sink: MemorySink | None = None) -> None:
        self.sink = sink or MemorySink()
        self.want = WANT
        self.version = 1
        self.refuse: dict[str, CdcError] = {}
        """By name of the object."""
        self.tried: list[tuple[str, str]] = []
        self.sink.before_repair = self._before
        lease = Lease()
        lease.configure(60)
        lease.heartbeat_sent(1, boottime())
        lease.heartbeat_acked(1)
        log = structlog.get_logger()
        self.troubles = Troubles(log, lambda: None)
        self.conditions: dict[str, str] = {}
        self.halt = asyncio.Event()
        self.reconciler = Reconciler(
            self.sink,
            gate=WriteGate(lease, 8),
            halt=self.halt,
            troubles=self.troubles,
            conditions=self.conditions,
            properties=None,
            partitions=asyncio.Lock(),
            current=lambda: self.want,
            every_seconds=1000,
            log=log,
        )

    async def _before(self, difference: ObjectDifference) -> None:
        self.tried.append(difference.place)
        if difference.name in self.refuse:
            raise self.refuse[difference.name]

    async def open(self) -> None:
        await self.sink.open_collection(
            SAMPLE.want(), opened=False, adopt=False, recreate=False, sink_collection_id=0
        )

    def assignment(self, **other: Any) -> CollectionAssignment:
        about: dict[str, Any] = {
            "assignment_id": "t.7",
            "epoch": 1,
            "task": "tasks/t",
            "source": task_pb2.Source(),
            "sink": task_pb2.Sink(),
            "lanes": (),
            "opened": True,
            "sink_collection_id": 1,
            "adopt_existing": False,
            "recreate": False,
            "drop_granted": False,
            **other,
        }
        return CollectionAssignment(version=self.version, want=self.want, **about)

    async def run(self, **other: Any) -> None:
        await self.reconciler.run(self.assignment(**other), self.want)

    @property
    def indexes(self) -> set[str]:
        return set(self.sink.indexes("default", "c"))

    async def as_wanted(self) -> None:
        """Everything carried out, by hand and before."""
        await self.open()
        assert await reconcile(self.sink, self.want) == ()
        self.tried.clear()


async def test_what_is_refused_is_named_and_stops_nothing_else() -> None:
    bench = Bench()
    await bench.open()
    bench.refuse["v1"] = UserError("SINK_REFUSED", "no such index type")
    await bench.run()
    assert bench.indexes == {"n1"}
    assert bench.sink.loaded("default", "c") == {"_default", "p1"}
    trouble = bench.troubles.first
    assert trouble is not None
    assert trouble.reason == "SINK_REFUSED"
    assert "'v1'" in trouble.message
    assert "no such index type" in trouble.message
    assert bench.tried.count(("index", "v1")) == 1, "not at once again"
    assert not bench.reconciler.due(1), "nor soon"
    assert bench.reconciler.applied_version == 0
    assert bench.reconciler.due(2), "after a change or on demand"
    del bench.refuse["v1"]
    bench.version = 2
    await bench.run()
    assert bench.indexes == {"v1", "n1"}
    assert bench.troubles.first is None
    assert bench.reconciler.applied_version == 2


async def test_what_may_pass_by_itself_is_tried_again_sooner_and_ever_later() -> None:
    bench = Bench()
    await bench.open()
    bench.refuse["v1"] = RetryableError("SINK_QUOTA", "later")
    waits = []
    for _ in range(5):
        await bench.run()
        waits.append(bench.reconciler._next - time.monotonic())
    assert waits[:4] == sorted(waits[:4])
    assert 0 < waits[0] < 5
    assert waits[-1] < 100
    assert bench.tried.count(("index", "v1")) == 5


async def test_a_repair_without_effect_is_not_repeated_before_something_changes() -> None:
    class Stubborn(MemorySink):
        async def repair(
            self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
        ) -> None:
            if difference.name == "v1":
                bench.tried.append(difference.place)
                return
            await super().repair(want, difference, sink_collection_id=sink_collection_id)

    bench = Bench(Stubborn())
    await bench.open()
    await bench.run()
    assert bench.troubles.first is not None
    assert bench.troubles.first.reason == "SINK_CHANGE_WITHOUT_EFFECT"
    times = bench.tried.count(("index", "v1"))
    await bench.run()
    await bench.run()
    assert bench.tried.count(("index", "v1")) == times
    bench.version = 2
    await bench.run()
    assert bench.tried.count(("index", "v1")) > times


async def test_a_collection_as_wanted_is_looked_at_once() -> None:
    bench = Bench()
    await bench.as_wanted()
    looks = bench.sink.diffs
    await bench.run()
    assert bench.sink.diffs == looks + 1
    assert bench.tried == []
    assert bench.reconciler.applied_version == 1


async def test_reported_drift_is_left_and_the_source_s_own_changes_are_not() -> None:
    bench = Bench()
    await bench.as_wanted()
    held = bench.sink._at("default", "c")
    held.indexes.pop("n1")
    held.partitions["of_somebody"] = []
    held.loaded.clear()
    held.properties["collection.ttl.seconds"] = "5"
    about = {"drift": Drift.REPORT, "applied": Applied.of(WANT)}
    await bench.run(**about)
    assert bench.tried == []
    assert "and 1 more" in bench.conditions["DRIFT"]
    # The source makes an index and sets a property: that much is carried, and no more.
    third = flat_index("n", name="n3")
    bench.want = replace(WANT, indexes=(*WANT.indexes, third), alter_ts=9)
    bench.version = 2
    await bench.run(**about)
    assert set(bench.tried) == {("index", "n3"), ("property", "collection.ttl.seconds")}
    assert "DRIFT" in bench.conditions
    bench.version = 3
    await bench.run(drift=Drift.REPAIR)
    assert "DRIFT" not in bench.conditions
    assert await bench.sink.diff(bench.want, Carry()) == ()


async def test_what_an_owner_before_did_and_could_not_say_is_the_source_s_doing() -> None:
    bench = Bench()
    await bench.as_wanted()
    held = bench.sink._at("default", "c")
    held.indexes["between"] = ("n", ())  # made for a version that is over
    held.loaded.clear()
    known = Applied.of(WANT)
    touched = replace(known, touched_indexes=frozenset({"between"}), touched_load=True)
    await bench.run(drift=Drift.REPORT, applied=touched)
    assert bench.indexes == {"v1", "n1"}
    assert bench.sink.loaded("default", "c")
    assert "DRIFT" not in bench.conditions


async def test_a_surplus_partition_is_kept_when_the_source_makes_it_meanwhile() -> None:
    bench = Bench()
    await bench.as_wanted()
    bench.sink._at("default", "c").partitions["p2"] = []
    before = bench.want
    bench.want = replace(WANT, partitions=(*WANT.partitions, Partition(60, "p2", 1)))
    await bench.reconciler.run(bench.assignment(), before)
    assert ("partition", "p2") not in bench.tried
    assert "p2" in bench.sink.partitions("default", "c")


async def test_a_part_drops_no_partition_that_another_part_may_just_have_made() -> None:
    bench = Bench()
    await bench.as_wanted()
    bench.sink._at("default", "c").partitions["p2"] = []
    await bench.run(part=True)
    assert ("partition", "p2") not in bench.tried
    await bench.run()
    assert ("partition", "p2") in bench.tried


async def test_a_partition_dropped_by_the_log_meanwhile_is_not_made_again() -> None:
    bench = Bench()
    await bench.as_wanted()
    del bench.sink._at("default", "c").partitions["p1"]
    before = bench.want
    left = tuple(p for p in WANT.partitions if p.name != "p1")
    bench.want = replace(WANT, partitions=left)
    await bench.reconciler.run(bench.assignment(), before)
    assert ("partition", "p1") not in bench.tried
    assert "p1" not in bench.sink.partitions("default", "c")


async def test_a_partition_made_anew_is_said_to_be_empty() -> None:
    bench = Bench()
    await bench.as_wanted()
    del bench.sink._at("default", "c").partitions["p1"]
    await bench.run(applied=Applied.of(WANT))
    assert "p1" in bench.sink.partitions("default", "c")
    assert "p1" in bench.conditions["PARTITION_EMPTIED"]


async def test_a_collection_that_is_gone_is_an_error_in_either_mode() -> None:
    for mode in Drift:
        bench = Bench()
        await bench.as_wanted()
        await bench.sink.drop_collection(WANT, sink_collection_id=1)
        with pytest.raises(UserError) as failed:
            await bench.run(drift=mode)
        assert failed.value.reason == "SINK_COLLECTION_MISSING"


async def test_a_stop_does_not_wait_for_a_sink_that_does_not_answer() -> None:
    class Silent(MemorySink):
        async def diff(self, *_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

    bench = Bench(Silent())
    running = asyncio.create_task(bench.run())
    await asyncio.sleep(0)
    bench.halt.set()
    await asyncio.wait_for(running, 5)


def test_a_partition_is_forgotten_once_its_drop_is_certainly_done() -> None:
    dropped = SAMPLE.want(dropped=("p1",))
    parts = (*dropped.partitions[:1], replace(dropped.partitions[1], drop_ts=ms_to_tso(1_000_000)))
    want = replace(dropped, partitions=parts)

    def names(found: Collection) -> list[str]:
        return [p.name for p in found.partitions]

    assert names(without_dropped(want, ms_to_tso(1_000_001), frozenset())) == ["_default", "p1"]
    late = ms_to_tso(1_000_000 + DROP_MARGIN_MS)
    assert names(without_dropped(want, late, frozenset())) == ["_default"]
    assert names(without_dropped(want, 0, frozenset({51}))) == ["_default"]
    unknown = replace(want, partitions=dropped.partitions)
    assert names(without_dropped(unknown, late, frozenset())) == ["_default", "p1"]
    # The metadata is heard of later than the log: what was dropped with that is gone for good.
    alive = SAMPLE.want()
    assert without_dropped(alive, late, frozenset()) is alive
    assert "p1" not in names(without_dropped(alive, 0, frozenset({51})))
