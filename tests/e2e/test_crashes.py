"""Whatever dies, however it ends: missing 0, extra 0, different 0, doubled 0."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvuscdc.v1 import task_pb2
from pymilvus import MilvusClient, MilvusException

from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import Pair
from tests.servers import Stack
from tests.servers.process import ManagedProcess
from tests.servers.stack import SourceQueue

# What a service may say when its peer or its servers vanish under it.
LOST_PEER = (
    r"stream to the controller lost",
    r"controller not reachable",
    r'"event": "retrying',
    r"reading interrupted",
    r"operations interrupted",
    r"stream ended",
    r"replicator (lost|stream ended|suspect)",
    r"lease",
)

QUICK_ROUNDS = 6
SOAK_ROUNDS = 20


@pytest.fixture
def own_stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """For those who kill its servers: nobody after them has to live with what that costs."""
    queue: SourceQueue = getattr(request, "param", "natsmq")
    if queue == "kafka":
        request.getfixturevalue("kafka_available")
    with Stack(tmp_path / "stack", mq=queue) as stack:
        yield stack


def _restart(process: ManagedProcess, how: str) -> None:
    process.restart(hard=how == "kill")


def crash_rounds(
    stack: Stack,
    folder: Path,
    database: str,
    rounds: int,
    crash: Callable[[Pair, random.Random], None],
    **settings: Any,
) -> int:
    """A mixed load on every shape; `crash` once a round; the proof at the end."""
    load = Load(stack.source.uri, database, seed=rounds, pause_seconds=0.02)
    load.create()
    rng = random.Random(database)
    began = time.monotonic()
    with Pair(stack, folder, replicators=2, **settings) as pair:
        pair.create(f"{database}.*")
        load.start()
        try:
            for _ in range(rounds):
                time.sleep(rng.uniform(1.0, 3.0))
                crash(pair, rng)
        finally:
            load.stop()
        pair.wait_running(*(f"{database}.{shape.name}" for shape in SHAPES), seconds=300)
        rows = pair.prove()
        print(
            f"{database}: {rounds} rounds, {load.acknowledged} rows acknowledged by the source,"
            f" {rows} rows compared, {time.monotonic() - began:.0f} s"
        )
        pair.quiet(*LOST_PEER)
        return rows


WHO = ("replicator", "controller", "both")
HOW = ("kill", "term")


def ending(who: str, how: str) -> Callable[[Pair, random.Random], None]:
    def crash(pair: Pair, rng: random.Random) -> None:
        if who in ("controller", "both"):
            _restart(pair.controller, how)
        if who in ("replicator", "both"):
            _restart(rng.choice(pair.replicators), how)

    return crash


def _each_in_turn() -> Callable[[Pair, random.Random], None]:
    """Every way of ending every service, one a round."""
    ways = itertools.cycle(itertools.product(WHO, HOW))

    def crash(pair: Pair, rng: random.Random) -> None:
        ending(*next(ways))(pair, rng)

    return crash


@pytest.mark.timeout(400)
def test_killed_and_stopped_on_nats(nats_stack: Stack, tmp_path: Path) -> None:
    assert crash_rounds(nats_stack, tmp_path, "crash_nats", QUICK_ROUNDS, _each_in_turn())


@pytest.mark.timeout(400)
def test_a_killed_controller_on_etcd_finds_everything_again(
    nats_stack: Stack, tmp_path: Path
) -> None:
    store = {"etcd": {"endpoints": [nats_stack.etcd.endpoint], "prefix": "cdc", "leaseSeconds": 3}}
    assert crash_rounds(
        nats_stack, tmp_path, "crash_etcd_store", 2, ending("both", "kill"), store=store
    )


@pytest.mark.kafka
@pytest.mark.timeout(400)
def test_killed_and_stopped_on_kafka(kafka_stack: Stack, tmp_path: Path) -> None:
    assert crash_rounds(kafka_stack, tmp_path, "crash_kafka", QUICK_ROUNDS, _each_in_turn())


@pytest.mark.soak
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    "queue", ["nats", "kafka", pytest.param("pulsar", marks=pytest.mark.pulsar)]
)
def test_twenty_times(
    request: pytest.FixtureRequest, tmp_path: Path, queue: str, who: str, how: str
) -> None:
    stack: Stack = request.getfixturevalue(f"{queue}_stack")
    assert crash_rounds(stack, tmp_path, f"soak_{queue}_{who}_{how}", SOAK_ROUNDS, ending(who, how))


@pytest.mark.timeout(300)
def test_a_frozen_replicator_writes_nothing_after_its_lease(
    nats_stack: Stack, tmp_path: Path
) -> None:
    load = Load(nats_stack.source.uri, "crash_frozen", pause_seconds=0.02)
    load.create()
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create("crash_frozen.*")
        load.start()
        pair.wait_running(*(f"crash_frozen.{shape.name}" for shape in SHAPES))
        time.sleep(2)
        frozen, other = pair.replicators
        frozen.pause()
        pair.wait(
            "the other one has taken over",
            lambda: {a.replicator for a in pair.assignments()} == {f"replicators/{other.name}"},
        )
        time.sleep(2)
        frozen.resume()
        time.sleep(3)
        load.stop()
        pair.wait_running(*(f"crash_frozen.{shape.name}" for shape in SHAPES))
        assert pair.prove()
        epochs = {a.epoch for a in pair.assignments() if a.collection}
        assert max(epochs) > 1
        pair.quiet(*LOST_PEER)


@pytest.mark.timeout(400)
def test_servers_that_go_away_and_come_back(own_stack: Stack, tmp_path: Path) -> None:
    """The sink, the source with its queue, the source's etcd, the controller: one after the
    other.
    """
    load = Load(own_stack.source.uri, "crash_servers", pause_seconds=0.02)
    load.create()
    names = [f"crash_servers.{shape.name}" for shape in SHAPES]
    with Pair(own_stack, tmp_path) as pair:
        pair.create("crash_servers.*")
        load.start()
        pair.wait_running(*names)

        own_stack.sink.kill()
        time.sleep(5)
        states = {c.state for c in pair.collections().values()}
        assert task_pb2.COLLECTION_STATE_RETRYING in states
        reasons = {c.reason for c in pair.collections().values() if c.reason}
        assert reasons <= {"SINK_UNAVAILABLE", "SINK_UNKNOWN_OUTCOME", "SINK_NOT_READY"}, reasons
        own_stack.sink.start()
        pair.wait_running(*names, seconds=120)

        load.stop()
        own_stack.source.kill()
        pair.wait(
            "the queue's absence is shown",
            lambda: any(
                c.state == task_pb2.COLLECTION_STATE_RETRYING for c in pair.collections().values()
            ),
        )
        own_stack.source.start()
        pair.wait_running(*names, seconds=120)
        assert pair.prove_after_crash_of_milvus()

        pair.controller.kill()
        again = Load(own_stack.source.uri, "crash_servers", seed=7, pause_seconds=0.02)
        again.shapes = (SHAPES[5],)
        again.start()
        time.sleep(3)
        again.stop()
        pair.controller.start()
        pair.wait_running(*names, seconds=60)
        assert pair.prove()
        pair.quiet(*LOST_PEER, "source (metadata|etcd)", "SOURCE_")


class PatientLoad(Load):
    """Goes on when the source refuses a call because a server of its own is away."""

    refused = 0

    def _one_call(self, *args: Any) -> None:
        try:
            super()._one_call(*args)
        except (MilvusException, grpc.RpcError):
            self.refused += 1
            self._stop.wait(0.5)

    def _upsert(
        self, client: MilvusClient, name: str, rows: list[Any], partition: dict[str, Any]
    ) -> None:
        """Until it is acknowledged, as any client would: of one that a Milvus died in the insert
        may be in the log and the delete not, and then the source itself has both rows.
        """
        deadline = time.monotonic() + 120
        while True:
            try:
                super()._upsert(client, name, rows, partition)
                return
            except (MilvusException, grpc.RpcError):
                if time.monotonic() > deadline:
                    raise
                self.refused += 1
                time.sleep(0.5)


def _as_an_operator(*servers: ManagedProcess) -> None:
    """What did not survive the loss of a server is started again."""
    for server in servers:
        if not server.running:
            server.start()


@pytest.mark.timeout(400)
def test_the_sources_etcd_is_killed_under_load_and_comes_back(
    own_stack: Stack, tmp_path: Path
) -> None:
    load = PatientLoad(own_stack.source.uri, "crash_etcd", pause_seconds=0.05)
    load.create()
    names = [f"crash_etcd.{shape.name}" for shape in SHAPES]
    with Pair(own_stack, tmp_path) as pair:
        pair.create("crash_etcd.*")
        pair.wait_running(*names)
        load.start()
        time.sleep(2)
        own_stack.etcd.kill()
        time.sleep(2)
        own_stack.etcd.start()
        time.sleep(3)
        load.stop()
        _as_an_operator(own_stack.source, own_stack.sink)
        pair.wait_running(*names, seconds=120)
        assert pair.prove()
        pair.quiet(*LOST_PEER, "source (metadata|etcd)", "SOURCE_", "ETCD_")


@pytest.mark.timeout(600)
def test_an_etcd_that_stays_away_costs_both_milvus_their_session_and_no_row(
    own_stack: Stack, tmp_path: Path
) -> None:
    load = Load(own_stack.source.uri, "crash_session", pause_seconds=0.05)
    load.create()
    names = [f"crash_session.{shape.name}" for shape in SHAPES]
    with Pair(own_stack, tmp_path) as pair:
        pair.create("crash_session.*")
        load.start()
        pair.wait_running(*names)
        load.stop()
        own_stack.etcd.kill()
        pair.wait("it is shown", lambda: pair.get().state == task_pb2.TASK_STATE_RETRYING)
        assert pair.get().reason
        time.sleep(15)
        own_stack.etcd.start()
        # Without its session a Milvus answers and does nothing more, and does not heed a TERM.
        for server in (own_stack.source, own_stack.sink):
            server.restart(hard=True)
        pair.wait_running(*names, seconds=180)
        again = Load(own_stack.source.uri, "crash_session", seed=7, pause_seconds=0.05)
        again.shapes = (SHAPES[5],)
        again.start()
        time.sleep(3)
        again.stop()
        assert pair.prove()
        pair.quiet(*LOST_PEER, "source (metadata|etcd)", "SOURCE_", "ETCD_")


@pytest.mark.kafka
@pytest.mark.timeout(400)
@pytest.mark.parametrize("own_stack", ["kafka"], indirect=True)
def test_the_kafka_broker_is_killed_under_load_and_comes_back(
    own_stack: Stack, tmp_path: Path
) -> None:
    assert own_stack.kafka is not None
    load = PatientLoad(own_stack.source.uri, "crash_broker", pause_seconds=0.05)
    load.create()
    names = [f"crash_broker.{shape.name}" for shape in SHAPES]
    with Pair(own_stack, tmp_path) as pair:
        pair.create("crash_broker.*")
        pair.wait_running(*names)
        load.start()
        time.sleep(3)
        own_stack.kafka.kill()
        pair.wait(
            "the broker's absence is shown",
            lambda: any(c.reason == "QUEUE_UNREACHABLE" for c in pair.collections().values()),
        )
        own_stack.kafka.start()
        time.sleep(3)
        load.stop()
        _as_an_operator(own_stack.source, own_stack.sink)
        pair.wait_running(*names, seconds=120)
        assert pair.prove()
        pair.quiet(*LOST_PEER)
