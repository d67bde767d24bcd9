"""A source with very many collections: the first listing, the controller's memory, what one change
costs.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from milvuscdc.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc

from benchmarks.rig import wait_until
from benchmarks.usage import cpu_seconds, peak_mib, resident_mib
from tests.servers import EtcdServer, many
from tests.servers.services import ControllerProcess

ROOT = "many"
CHANGES = 20
CHANGE_SECONDS = 0.3
SETTLE_SECONDS = 3.0
SETTLE_ROUNDS = 15
SETTLED_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Metadata:
    """Of a controller whose task follows none or all of the collections."""

    collections: int
    followed: int
    listing_seconds: float
    """Of the creation of the task, which reads the metadata once as a whole."""
    listing_cpu_seconds: float
    """CPU of the controller until it has taken in everything: two listings."""
    before_mib: float
    after_mib: float
    peak_mib: float
    change_cpu_ms: float
    """CPU of the controller for one changed key, beyond what it needs at rest."""


def measure(collections: int) -> list[Metadata]:
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder:
        with EtcdServer(Path(folder) / "etcd") as etcd:
            many.put_all(etcd.endpoint, many.cluster_keys(ROOT))
            keys = (key for n in range(collections) for key in many.collection_keys(n, ROOT))
            many.put_all(etcd.endpoint, keys)
            return [
                _one(Path(folder) / f"{followed}", etcd, collections, followed)
                for followed in (0, collections)
            ]


def _one(folder: Path, etcd: EtcdServer, collections: int, followed: int) -> Metadata:
    with ControllerProcess(folder) as controller:
        before = resident_mib(controller.pid)
        include = "default.many_*" if followed else "default.none_*"
        with grpc.insecure_channel(controller.address) as channel:
            tasks = task_service_pb2_grpc.TaskServiceStub(channel)
            began, cpu = time.monotonic(), cpu_seconds(controller.pid)
            tasks.CreateTask(
                task_service_pb2.CreateTaskRequest(task=_task(etcd, include)), timeout=120
            )
            listing = time.monotonic() - began

            def all_there() -> bool:
                request = task_service_pb2.GetTaskRequest(name="tasks/many")
                return tasks.GetTask(request, timeout=30).task.progress.collections >= followed

            wait_until(all_there, 120, "the listing", every=0.2)
            _settle(controller.pid)
            taken_in = cpu_seconds(controller.pid) - cpu
            cpu = cpu_seconds(controller.pid)
            time.sleep(CHANGES * CHANGE_SECONDS)
            at_rest = cpu_seconds(controller.pid) - cpu
            cpu = cpu_seconds(controller.pid)
            for number in range(CHANGES):
                keys = dict(many.collection_keys(number, ROOT, f"changed {number}"))
                changed = many.info_key(number, ROOT)
                many.put_all(etcd.endpoint, [(changed, keys[changed])])
                time.sleep(CHANGE_SECONDS)
            cpu = max(0.0, cpu_seconds(controller.pid) - cpu - at_rest)
        return Metadata(
            collections,
            followed,
            listing,
            taken_in,
            before,
            resident_mib(controller.pid),
            peak_mib(controller.pid),
            cpu * 1000 / CHANGES,
        )


def _settle(pid: int) -> None:
    """Until what the listing set going has ended."""
    for _ in range(SETTLE_ROUNDS):
        before = cpu_seconds(pid)
        time.sleep(SETTLE_SECONDS)
        if cpu_seconds(pid) - before < SETTLED_SHARE * SETTLE_SECONDS:
            return


def _task(etcd: EtcdServer, include: str) -> task_pb2.Task:
    return task_pb2.Task(
        name="tasks/many",
        source=task_pb2.Source(
            etcd=task_pb2.EtcdMetadata(endpoints=[etcd.endpoint], root_path=ROOT),
            nats=task_pb2.NatsQueue(url="nats://127.0.0.1:1"),
        ),
        sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
        selection=task_pb2.Selection(include=[include]),
        start=task_pb2.Start(earliest=task_pb2.Earliest()),
    )
