"""Three controllers on an etcd of three members and four replicators between real servers, over
connections that are late and break; whatever happens to them, in the end every row is there once.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.load import SHAPES
from tests.e2e.pair import Pair
from tests.e2e.test_crashes import LOST_PEER, PatientLoad
from tests.e2e.wires import Wire, Wires
from tests.servers import Stack
from tests.servers.etcd import EtcdCluster
from tests.servers.logs import assert_quiet
from tests.servers.process import ManagedProcess
from tests.servers.services import ControllerProcess, ReplicatorProcess
from tests.servers.stack import SourceQueue

SEED = os.environ.get("MILVUS_CDC_FAULTS_SEED", "1")
SOAK_FAULTS = 200
PROVED_EVERY = 10
TTL_SECONDS = 15
"""Of replicators, the default, plus the margin of the clocks."""
UNHEARD = TTL_SECONDS + 2

# What services may say when what they need is away.
IN_TROUBLE = (
    *LOST_PEER,
    r"leads",
    r"election",
    r"STORE_UNAVAILABLE",
    r"ETCD_UNAVAILABLE",
    r"SOURCE_",
    r"SINK_",
    r"a source's metadata cannot be read",
    r"INSTANCE_IN_USE",
)


class Many(Pair):
    """`controller` is the one that the test talks to. Every replicator has wires of its own."""

    def __init__(self, stack: Stack, folder: Path, etcd: EtcdCluster, wires: Wires) -> None:
        super().__init__(stack, folder, replicators=0)
        self.etcd = etcd
        self.wires = wires
        store = {"etcd": {"endpoints": etcd.endpoints, "prefix": "many", "leaseSeconds": 5}}
        lease = {"ttl": TTL_SECONDS, "heartbeat": 3, "clockMargin": 2}
        self.controllers = [
            ControllerProcess(folder, name=f"controller-{n}", store=store, lease=lease)
            for n in range(3)
        ]
        self.controller = self.controllers[0]
        self.ways: dict[str, list[Wire]] = {}
        for n in range(4):
            name = f"replicator-{n}"
            self.ways[name] = [wires.to(controller.address) for controller in self.controllers]
            order = [wire.address for wire in self.ways[name]]
            random.Random(n).shuffle(order)
            self.replicators.append(ReplicatorProcess(folder, order, name))

    def __enter__(self) -> Many:
        for controller in self.controllers:
            controller.spawn()
        for controller in self.controllers:
            controller.wait_ready()
        for replicator in self.replicators:
            replicator.spawn()
        for replicator in self.replicators:
            replicator.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.replicators, *self.controllers):
            process.stop()

    def start_what_died(self) -> None:
        """As whoever supervises them would: a Milvus 2.3.5 that starts on a busy machine may end by
        itself (it asks for the metrics of a node to which it has no connection yet).
        """
        for server in (self.stack.source, self.stack.sink):
            if not server.running:
                print(f"{time.strftime('%T')} {server.name} had died", flush=True)
                server.start()

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        def comes_true() -> bool:
            self.start_what_died()
            return condition()

        super().wait(what, comes_true, seconds)

    def retry(self, what: str, call: Callable[[], Any], seconds: float = 120) -> Any:
        """Asks one controller after the other: that one may be away, or know no leader."""
        deadline = time.monotonic() + seconds
        for controller in itertools.cycle(self.controllers):
            self.controller = controller
            try:
                return call()
            except grpc.RpcError as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{what}: {error}") from error
                time.sleep(0.5)
        raise AssertionError("unreachable")


Fault = Callable[[Many, random.Random], None]


def _restart(process: ManagedProcess, rng: random.Random, *, hard: bool) -> None:
    if hard:
        process.kill()
    else:
        process.stop()
    time.sleep(rng.uniform(0, 4))
    process.spawn()


def replicator_killed(many: Many, rng: random.Random) -> None:
    _restart(rng.choice(many.replicators), rng, hard=True)


def replicator_stopped(many: Many, rng: random.Random) -> None:
    _restart(rng.choice(many.replicators), rng, hard=False)


def controller_killed(many: Many, rng: random.Random) -> None:
    _restart(rng.choice(many.controllers), rng, hard=True)


def controller_stopped(many: Many, rng: random.Random) -> None:
    _restart(rng.choice(many.controllers), rng, hard=False)


def _frozen(processes: list[Any], seconds: float) -> None:
    for process in processes:
        process.pause()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def controller_frozen(many: Many, rng: random.Random) -> None:
    _frozen([rng.choice(many.controllers)], rng.uniform(2, 12))


def zombie(many: Many, rng: random.Random) -> None:
    """It comes back when others have its work."""
    _frozen([rng.choice(many.replicators)], UNHEARD + rng.uniform(1, 6))


def two_zombies(many: Many, rng: random.Random) -> None:
    _frozen(rng.sample(many.replicators, 2), UNHEARD + rng.uniform(1, 6))


def cut_off(many: Many, rng: random.Random) -> None:
    """A replicator that reaches queue and sink, and no controller."""
    wires = many.ways[rng.choice(many.replicators).name]
    many.wires.hold(wires, True)
    time.sleep(rng.uniform(3, UNHEARD + 8))
    many.wires.hold(wires, False)


def controller_cut_off(many: Many, rng: random.Random) -> None:
    """A controller that no replicator reaches; it may lead."""
    index = rng.randrange(len(many.controllers))
    wires = [ways[index] for ways in many.ways.values()]
    many.wires.hold(wires, True)
    time.sleep(rng.uniform(3, 15))
    many.wires.hold(wires, False)


def etcd_leader_killed(many: Many, rng: random.Random) -> None:
    member = many.etcd.leader()
    member.kill()
    time.sleep(rng.uniform(1, 6))
    member.start()


def sink_killed(many: Many, rng: random.Random) -> None:
    many.stack.sink.kill()
    time.sleep(rng.uniform(0, 3))
    many.stack.sink.start()


def broker_killed(many: Many, rng: random.Random) -> None:
    """Kafka; NATS lives in the source's own process."""
    assert isinstance(many.stack, Stack)
    broker = many.stack.kafka
    if broker is None:
        _kill_source(many.stack)
    else:
        broker.kill()
        time.sleep(rng.uniform(0, 3))
        broker.start()


def _kill_source(stack: Stack) -> None:
    stack.source.kill()
    stack.source.start()


FAULTS: dict[Fault, int] = {
    replicator_killed: 5,
    replicator_stopped: 4,
    zombie: 4,
    two_zombies: 1,
    cut_off: 4,
    controller_killed: 4,
    controller_stopped: 2,
    controller_frozen: 3,
    controller_cut_off: 2,
    etcd_leader_killed: 2,
    sink_killed: 1,
    broker_killed: 1,
}
SHORT = (
    controller_killed,
    zombie,
    etcd_leader_killed,
    cut_off,
    replicator_killed,
    controller_frozen,
)


def run_of(faults: Sequence[Fault], many: Many, database: str, rng: random.Random) -> None:
    """A mixed load meanwhile; after every ten faults, and at the end, all rows are compared."""
    load = PatientLoad(many.stack.source.uri, database, pause_seconds=0.02, rows_max=4_000)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    many.create(f"{database}.*")
    load.start()
    many.wait_running(*names)
    done = 0
    for first in range(0, len(faults), PROVED_EVERY):
        for fault in faults[first : first + PROVED_EVERY]:
            time.sleep(rng.uniform(1, 4))
            print(f"{time.strftime('%T')} {fault.__name__}", flush=True)
            fault(many, rng)
            many.start_what_died()
            done += 1
        load.stop()
        for process in (*many.controllers, *many.replicators):
            process.wait_ready()
        many.retry("running", lambda: many.wait_running(*names, seconds=240))
        rows = many.retry("compared", many.prove_after_crash_of_milvus, seconds=300)
        epochs = {a.epoch for a in many.assignments()}
        print(
            f"after {done} faults: {rows} rows compared, missing 0, extra 0, different 0; "
            f"{load.acknowledged} acknowledged, {many.wires.cuts} connections cut, "
            f"epochs up to {max(epochs)}",
            flush=True,
        )
        load.start()
    load.stop()


def _whole(stack: Stack, folder: Path, faults: Sequence[Fault], database: str) -> None:
    rng = random.Random(f"{SEED} {database}")
    with (
        EtcdCluster(folder / "etcd") as etcd,
        Wires(SEED) as wires,
        Many(stack, folder, etcd, wires) as many,
    ):
        run_of(faults, many, database, rng)
        for process in (*many.controllers, *many.replicators):
            assert_quiet(process.log_path, IN_TROUBLE)


@pytest.mark.timeout(600)
def test_a_fault_after_the_other(nats_stack: Stack, tmp_path: Path) -> None:
    _whole(nats_stack, tmp_path, SHORT, "many_short")


@pytest.mark.soak
@pytest.mark.parametrize("queue", ["natsmq", "kafka"])
def test_two_hundred_faults(
    request: pytest.FixtureRequest, tmp_path: Path, queue: SourceQueue
) -> None:
    """MILVUS_CDC_FAULTS_SEED draws others."""
    if queue == "kafka":
        request.getfixturevalue("kafka_available")
    drawn = random.Random(f"faults {SEED}").choices(list(FAULTS), [*FAULTS.values()], k=SOAK_FAULTS)
    with Stack(tmp_path / "stack", mq=queue) as stack:
        _whole(stack, tmp_path, drawn, "many")
