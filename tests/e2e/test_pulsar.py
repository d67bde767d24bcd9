"""A Milvus on Pulsar is followed exactly, whatever dies; what its broker forgot is said."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from milvuscdc.v1 import hold_pb2, task_service_pb2

from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import TASK, Pair
from tests.e2e.test_crashes import LOST_PEER, PatientLoad
from tests.servers import Stack

pytestmark = pytest.mark.pulsar


def prove(pair: Pair) -> int:
    """Missing 0, extra 0, different 0, doubled 0; the rows compared.

    A Milvus doubles rows itself when its topic moves under a write: it tries again with what had
    been taken. The sink has them once.
    """
    results = pair.verify()
    for result in results:
        found = (result.missing, result.extra, result.different, result.doubled)
        assert found == (0, 0, 0, 0), result
        assert result.reason in ("", "SOURCE_DUPLICATE_KEYS"), result
        assert result.rows_source - result.source_doubled == result.rows_sink, result
    return sum(result.rows_source for result in results)


@pytest.mark.timeout(400)
def test_followed_through_a_killed_replicator_a_new_ledger_and_a_new_broker(
    pulsar_stack: Stack, tmp_path: Path
) -> None:
    assert pulsar_stack.pulsar is not None
    broker = pulsar_stack.pulsar
    shapes = (SHAPES[0], SHAPES[1], SHAPES[5])
    load = Load(pulsar_stack.source.uri, "on_pulsar", shapes=shapes, pause_seconds=0.05)
    load.create()
    names = [f"on_pulsar.{shape.name}" for shape in shapes]
    with Pair(pulsar_stack, tmp_path) as pair:
        pair.create("on_pulsar.*")
        load.start()
        pair.wait_running(*names, seconds=120)
        time.sleep(2)
        pair.replicators[0].restart(hard=True)
        time.sleep(2)
        for n in range(16):
            broker.roll(f"{pulsar_stack.source.cluster}-rootcoord-dml_{n}")
        time.sleep(2)
        load.stop()
        # Not by kill -9, as the contract tests do: a standalone 3.0.7 may come back without end
        # registering its own bookie, and then brings no entry (seen once).
        broker.restart()
        # Automatic keys: a write that the client repeats at a source just coming back to itself
        # would leave two rows of one key there.
        again = PatientLoad(pulsar_stack.source.uri, "on_pulsar", seed=7, shapes=shapes[2:])
        again.start()
        time.sleep(3)
        again.stop()
        pair.wait_running(*names, seconds=180)
        assert prove(pair) > 100
        pair.quiet(*LOST_PEER)


@pytest.mark.timeout(400)
def test_a_pause_outlasts_what_pulsar_deletes_and_the_last_deletion_leaves_nothing_behind(
    pulsar_stack: Stack, tmp_path: Path
) -> None:
    assert pulsar_stack.pulsar is not None
    broker, shapes = pulsar_stack.pulsar, (SHAPES[0],)
    topics = [f"{pulsar_stack.source.cluster}-rootcoord-dml_{n}" for n in range(16)]
    load = Load(pulsar_stack.source.uri, "held", shapes=shapes, pause_seconds=0.05)
    load.create()
    with Pair(pulsar_stack, tmp_path) as pair:
        pair.create("held.*")
        pair.wait_running(f"held.{shapes[0].name}", seconds=120)
        names = {hold.name for hold in pair.holds() if hold.state == hold_pb2.HOLD_STATE_KEPT}
        assert any("rootcoord-dml" in name for name in names)
        pair.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=TASK), timeout=30)
        pair.replicators[0].kill()
        load.start()
        time.sleep(2)
        load.stop()
        broker.retain(0, 0)
        try:
            for _ in range(2):  # nothing of ours is connected, and Milvus has acknowledged it all
                for topic in topics:
                    broker.roll(topic)
        finally:
            broker.retain(-1)
        pair.replicators[0].start()
        pair.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=TASK), timeout=30)
        pair.wait_running(f"held.{shapes[0].name}", seconds=120)
        assert pair.prove() > 100
        pair.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=TASK), timeout=30)
        pair.replicators[0].kill()
        pair.controller.restart(hard=True)
        pair.replicators[0].start()
        for name in names:
            _, subscription, topic = name.split("/")
            left: Any = [subscription]
            while subscription in left:
                time.sleep(0.5)
                left = broker.admin("GET", f"persistent/public/default/{topic}/subscriptions")
