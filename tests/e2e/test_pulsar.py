"""A Milvus on Pulsar is followed exactly, whatever dies; what its broker forgot is said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import Pair
from tests.e2e.test_crashes import (
    HOW,
    LOST_PEER,
    SOAK_ROUNDS,
    WHO,
    PatientLoad,
    crash_rounds,
    ending,
)
from tests.servers import Stack

pytestmark = pytest.mark.pulsar


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
        broker.restart(hard=True)
        # Automatic keys: a write that the client repeats at a source just coming back to itself
        # would leave two rows of one key there.
        again = PatientLoad(pulsar_stack.source.uri, "on_pulsar", seed=7, shapes=shapes[2:])
        again.start()
        time.sleep(3)
        again.stop()
        pair.wait_running(*names, seconds=180)
        assert pair.prove() > 100
        pair.quiet(*LOST_PEER)


@pytest.mark.soak
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("who", WHO)
def test_twenty_times(pulsar_stack: Stack, tmp_path: Path, who: str, how: str) -> None:
    name = f"soak_pulsar_{who}_{how}"
    assert crash_rounds(pulsar_stack, tmp_path, name, SOAK_ROUNDS, ending(who, how))
