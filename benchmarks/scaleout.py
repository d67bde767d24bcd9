"""How throughput grows with the number of replicators, where only the sinks are slow.

Every replicator writes to a simulated sink of its own of a fixed speed (`tests.slow_sink`:
one request after the other, so long for each row, nothing kept), slow enough that this machine
carries all of them. Source: real etcd and NATS, with rows written as Milvus writes them. Measured
is a stretch of a catch-up in which every replicator has something to do, rows by the sinks' own
journal: linear is so many times what one replicator reached.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
from milvuscdc.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc

from tests import slow_sink
from tests.servers import EtcdServer
from tests.servers.made_source import MadeSource
from tests.servers.nats import NatsServer
from tests.servers.services import ControllerProcess, ReplicatorProcess

FLEETS = (1, 2, 4)
COLLECTIONS = 16
ROWS_PER_SECOND = 2_000
"""Of one sink."""
BEGUN_SECONDS = 120
REST_SECONDS = 3.0
"""After everyone has begun, before it is measured."""
LEASE = {"ttl": 30, "heartbeat": 5, "clockMargin": 2}
"""A busy machine makes nobody silent."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """Of one fleet."""

    replicators: int
    rows_per_second: float
    linear: float
    """Part of what so many sinks take at most."""
    single: float
    """Part of so many times the rate of one replicator."""
    slowest: float
    """Part of its sink's speed that the replicator with the least reached."""


def measure(seconds: float) -> list[Scaled]:
    """Fleets one after the other, each for so long."""
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        etcd = stack.enter_context(EtcdServer(folder / "etcd"))
        queue = stack.enter_context(NatsServer(folder / "nats"))
        source = MadeSource(etcd, queue, COLLECTIONS)
        # Enough for one that has two of the collections.
        source.fill(round(ROWS_PER_SECOND * (seconds + REST_SECONDS) / 2))
        results: list[Scaled] = []
        for number in FLEETS:
            rates = _run(folder / f"fleet-{number}", source, number, seconds)
            rate = sum(rates)
            alone = results[0].rows_per_second if results else rate
            results.append(
                Scaled(
                    number,
                    rate,
                    rate / (number * ROWS_PER_SECOND),
                    rate / (number * alone),
                    min(rates) / ROWS_PER_SECOND,
                )
            )
        return results


def _run(folder: Path, source: MadeSource, number: int, seconds: float) -> list[float]:
    """Rows a second of each replicator."""
    folder.mkdir()
    journal = folder / "journal"
    env = slow_sink.installed(folder / "installed")
    with ExitStack() as stack:
        controller = stack.enter_context(ControllerProcess(folder, lease=LEASE))
        for each in range(number):
            stack.enter_context(
                ReplicatorProcess(folder, controller.address, f"replicator-{each}", env=env)
            )
        with grpc.insecure_channel(controller.address) as channel:
            request = task_service_pb2.CreateTaskRequest(task=_task(source, journal))
            task_service_pb2_grpc.TaskServiceStub(channel).CreateTask(request, timeout=60)
        deadline = time.monotonic() + BEGUN_SECONDS
        while len({each.process for each in slow_sink.read(journal)}) < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of {number} replicators have begun")
            time.sleep(0.2)
        begin = time.monotonic() + REST_SECONDS
        # What is under way at the end is in the journal when it is done.
        time.sleep(REST_SECONDS + seconds + 1.0)
        return _rates(slow_sink.read(journal), begin, begin + seconds)


def _rates(requests: list[slow_sink.Request], begin: float, end: float) -> list[float]:
    """Of what was begun before or ended after, the part that lies between."""
    rows: dict[int, float] = {}
    for each in requests:
        took = each.rows / ROWS_PER_SECOND
        lies = min(each.end, end) - max(each.end - took, begin)
        share = max(0.0, lies / took)
        rows[each.process] = rows.get(each.process, 0.0) + share * each.rows
    return [found / (end - begin) for found in rows.values()]


def _task(source: MadeSource, journal: Path) -> task_pb2.Task:
    return task_pb2.Task(
        name="tasks/scaled",
        source=source.spec,
        sink=slow_sink.sink(journal, 1 / ROWS_PER_SECOND, one_at_a_time=True),
        selection=task_pb2.Selection(include=["default.many_*"]),
        start=task_pb2.Start(earliest=task_pb2.Earliest()),
    )
