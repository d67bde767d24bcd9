"""The servers and services that are measured, and what their metrics say.

Law: everything lives below one temporary folder and is stopped by its own process id, backwards.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from milvuscdc.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc

from benchmarks.rows import drop
from tests.servers import Stack
from tests.servers.certificates import Authority
from tests.servers.process import ManagedProcess
from tests.servers.services import ControllerProcess, ReplicatorProcess

MILVUS_TICK_MS = 200
"""As Milvus is shipped."""
_WRITTEN = re.compile(
    r'^milvus_cdc_replicator_written_rows_total\{(.*)op="(\w+)"(.*)\} (\S+)$', re.MULTILINE
)


class Rig:
    """One stack of servers with our two services; `with` starts and stops them."""

    def __init__(
        self, queue: str, *, tick_ms: int = MILVUS_TICK_MS, etcd_beside: Authority | None = None
    ) -> None:
        """`tick_ms`: how often both Milvus say how far time is (`proxy.timeTickInterval`). With
        `etcd_beside` etcd listens with mutual TLS, too.
        """
        self.queue = queue
        self.tick_ms = tick_ms
        self.folder = Path(tempfile.mkdtemp(prefix="milvus-cdc-bench-"))
        self.stack = Stack(
            self.folder / "servers",
            mq="kafka" if queue == "kafka" else "natsmq",
            settings={"proxy": {"timeTickInterval": tick_ms}},
            etcd_beside=etcd_beside,
        )
        self.of_replicators: dict[str, Any] = {}
        """Further settings of each."""
        self.controller = ControllerProcess(self.folder / "controller")
        self.replicator = self._new_replicator()
        self._channel = grpc.insecure_channel(self.controller.address)
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self._channel)
        self._replicators = [self.replicator]

    def _new_replicator(self, *program: str | Path) -> ReplicatorProcess:
        name = f"replicator-{int(time.monotonic() * 1000)}"
        return ReplicatorProcess(
            self.folder / name,
            self.controller.address,
            name,
            program=program or ("-m", "milvus_cdc_replicator.app"),
            **self.of_replicators,
        )

    def fresh_replicator(self, *program: str | Path) -> ReplicatorProcess:
        """Stops the one that runs and starts another, so that its memory and counters are those
        of one measurement.
        """
        self.replicator.stop()
        self.replicator = self.spare_replicator(*program)
        return self.replicator

    def spare_replicator(self, *program: str | Path) -> ReplicatorProcess:
        spare = self._new_replicator(*program)
        self._replicators.append(spare)
        spare.start()
        return spare

    @property
    def services(self) -> dict[str, ManagedProcess]:
        return {"replicator": self.replicator, "controller": self.controller}

    @property
    def servers(self) -> dict[str, ManagedProcess]:
        queue: dict[str, ManagedProcess] = (
            {"kafka": self.stack.kafka} if self.stack.kafka is not None else {}
        )
        return {"source": self.stack.source, **queue, "sink": self.stack.sink}

    def create_task(self, name: str, collections: Sequence[str]) -> None:
        """Follows these collections of the default database from their beginning."""
        request = task_service_pb2.CreateTaskRequest(task=self.task(name, collections))
        self.tasks.CreateTask(request, timeout=30)

    def drop_at_sink(self, name: str) -> None:
        """Succeeds when there is no such collection."""
        drop(self.stack.sink.uri, name)

    def task(self, name: str, collections: Sequence[str]) -> task_pb2.Task:
        stack = self.stack
        source = task_pb2.Source(
            etcd=task_pb2.EtcdMetadata(
                endpoints=[stack.etcd.endpoint], root_path=stack.source.root_path
            ),
            milvus=task_pb2.MilvusEndpoint(uri=stack.source.uri),
        )
        if stack.kafka is not None:
            source.kafka.brokers.append(stack.kafka.brokers)
        else:
            source.nats.url = stack.source.nats_url
        return task_pb2.Task(
            name=f"tasks/{name}",
            source=source,
            sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri=stack.sink.uri)),
            selection=task_pb2.Selection(include=[f"default.{c}" for c in collections]),
            start=task_pb2.Start(earliest=task_pb2.Earliest()),
        )

    def delete_task(self, name: str) -> None:
        """Returns when it is gone."""
        request = task_service_pb2.DeleteTaskRequest(name=f"tasks/{name}", allow_missing=True)
        self.tasks.DeleteTask(request, timeout=30)
        get = task_service_pb2.GetTaskRequest(name=f"tasks/{name}")

        def gone() -> bool:
            try:
                self.tasks.GetTask(get, timeout=10)
            except grpc.RpcError as error:
                return bool(error.code() == grpc.StatusCode.NOT_FOUND)
            return False

        wait_until(gone, 60, f"task {name} to be deleted")

    def collections(self, name: str) -> list[task_pb2.TaskCollection]:
        request = task_service_pb2.ListTaskCollectionsRequest(
            parent=f"tasks/{name}", page_size=1000
        )
        return list(self.tasks.ListTaskCollections(request, timeout=10).collections)

    def check(self, name: str) -> None:
        """RuntimeError when the task or a collection of it FAILED."""
        task = self.tasks.GetTask(
            task_service_pb2.GetTaskRequest(name=f"tasks/{name}"), timeout=10
        ).task
        if task.state == task_pb2.TASK_STATE_FAILED or task.progress.collections_failed:
            words = [f"{task.reason} {task.message}"]
            words += [f"{c.collection}: {c.reason} {c.message}" for c in self.collections(name)]
            raise RuntimeError(f"task {name} failed: {'; '.join(words)}")

    def __enter__(self) -> Self:
        try:
            self.stack.start()
            self.controller.start()
            self.replicator.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(keep_logs=error is not None)

    def close(self, *, keep_logs: bool = False) -> None:
        self._channel.close()
        for process in [*self._replicators, self.controller]:
            with contextlib.suppress(Exception):
                process.stop()
        self.stack.stop()
        if keep_logs:
            shutil.rmtree(self.folder / "servers", ignore_errors=True)
            print(f"the services' logs are in {self.folder}", file=sys.stderr)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def written(replicator: ReplicatorProcess, task: str) -> dict[str, int]:
    """Rows durable at the sink by kind of request, as the replicator counts them."""
    with urllib.request.urlopen(replicator.metrics_url, timeout=30) as answer:
        page = answer.read().decode()
    rows: dict[str, int] = {}
    for before, op, after, value in _WRITTEN.findall(page):
        if f'task="{task}"' in before + after or f'task="tasks/{task}"' in before + after:
            rows[op] = rows.get(op, 0) + int(float(value))
    return rows


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, *, every: float = 0.1
) -> None:
    """RuntimeError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(every)
