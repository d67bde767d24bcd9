"""A task's requests in flight over two replicators, counted at the sink, changed while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc

from tests import slow_sink
from tests.e2e.pair import error_info
from tests.servers import EtcdServer
from tests.servers.made_source import MadeSource
from tests.servers.nats import NatsServer
from tests.servers.services import ControllerProcess, ReplicatorProcess

NAME = "tasks/limited"
COLLECTIONS = 8
ROWS = 12_000
ROWS_PER_REQUEST = 100
SECONDS_PER_ROW = 0.0004
WAIT_SECONDS = 60
LEASE = {"ttl": 30, "heartbeat": 5, "clockMargin": 2}
"""A busy machine makes nobody silent."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeSource]:
    folder = tmp_path_factory.mktemp("made")
    with EtcdServer(folder / "etcd") as etcd, NatsServer(folder / "nats") as queue:
        made = MadeSource(etcd, queue, COLLECTIONS)
        made.fill(ROWS, rows_per_message=ROWS_PER_REQUEST)
        yield made


class Fleet:
    """A controller and two replicators; `requests` is what the sink has seen of them."""

    def __init__(self, folder: Path, source: MadeSource) -> None:
        self._source = source
        self.journal = folder / "journal"
        env = slow_sink.installed(folder / "installed")
        self.controller = ControllerProcess(folder, lease=LEASE, placement={"settleSeconds": 1})
        self.replicators = [
            ReplicatorProcess(folder, self.controller.address, name, env=env) for name in "ab"
        ]

    def __enter__(self) -> Fleet:
        self.controller.start()
        for each in self.replicators:
            each.start()
        self._channel = grpc.insecure_channel(self.controller.address)
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self._channel)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        for each in (*self.replicators, self.controller):
            each.stop()

    def create(self, **limits: int) -> None:
        task = task_pb2.Task(
            name=NAME,
            source=self._source.spec,
            sink=slow_sink.sink(self.journal, SECONDS_PER_ROW),
            selection=task_pb2.Selection(include=["default.many_*"]),
            start=task_pb2.Start(earliest=task_pb2.Earliest()),
            batching=task_pb2.Batching(max_rows=ROWS_PER_REQUEST),
            limits=task_pb2.Limits(**limits),
        )
        self.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60)

    def limit(self, **limits: int) -> None:
        request = task_service_pb2.UpdateTaskRequest(
            task=task_pb2.Task(name=NAME, limits=task_pb2.Limits(**limits)),
            update_mask=field_mask_pb2.FieldMask(paths=[f"limits.{each}" for each in limits]),
        )
        self.tasks.UpdateTask(request, timeout=10)

    def requests(self, since: float = 0.0) -> list[slow_sink.Request]:
        return [each for each in slow_sink.read(self.journal) if each.begin >= since]

    @property
    def conditions(self) -> set[str]:
        request = task_service_pb2.GetTaskRequest(name=NAME)
        found = list(self.tasks.GetTask(request, timeout=10).task.conditions)
        for collection in self._collections():
            found += collection.conditions
        return {each.type for each in found}

    @property
    def holders(self) -> set[str]:
        return {each.replicator for each in self._collections()}

    def _collections(self) -> Any:
        request = task_service_pb2.ListTaskCollectionsRequest(parent=NAME)
        return self.tasks.ListTaskCollections(request, timeout=10).collections


def wait(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.timeout(180)
def test_requests_at_once_over_two_replicators(source: MadeSource, tmp_path: Path) -> None:
    with Fleet(tmp_path, source) as fleet:
        fleet.create(requests_in_flight=2)
        wait("both hold some", lambda: len(fleet.holders) == 2)
        wait("a limit shows", lambda: "RATE_LIMITED" in fleet.conditions)
        since, both = time.monotonic(), {each.pid for each in fleet.replicators}
        wait("both work", lambda: {each.process for each in fleet.requests(since)} == both)
        wait("requests", lambda: len(fleet.requests(since)) > 60)
        assert slow_sink.most_at_once(fleet.requests(since)) == 2

        # One at once cannot be divided: one replicator has all of it.
        fleet.limit(requests_in_flight=1)
        wait("one has it all", lambda: len(fleet.holders) == 1)
        wait("nobody else has any of it", lambda: "LIMITS_EXCEEDED" not in fleet.conditions)
        since = time.monotonic()
        wait("requests of the one", lambda: len(fleet.requests(since)) > 10)
        alone = fleet.requests(since)
        assert slow_sink.most_at_once(alone) == 1
        assert len({each.process for each in alone}) == 1

        with pytest.raises(grpc.RpcError) as refused:
            fleet.limit(connections=2)
        info = error_info(refused.value)
        assert info.reason == "NOT_FOR_THIS_SINK"
        assert info.metadata["field"] == "task.limits.connections"

        since = time.monotonic()
        fleet.limit(requests_in_flight=0)
        wait("more at once", lambda: slow_sink.most_at_once(fleet.requests(since)) > 4)
        total = COLLECTIONS * ROWS
        wait("every row", lambda: sum(each.rows for each in fleet.requests()) >= total)
