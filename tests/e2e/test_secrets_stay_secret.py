"""Secrets of every kind are planted in a run on real servers; nothing that it leaves behind or
answers may hold one of them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvus_cdc.cli.main import main
from milvuscdc.v1 import fleet_service_pb2, secret_pb2, sink_postgres_pb2, task_pb2
from milvuscdc.v1 import task_service_pb2 as api_pb
from pymilvus import MilvusClient

from tests.e2e.pair import Pair, error_info
from tests.servers import Stack
from tests.servers.etcd import EtcdServer
from tests.servers.postgres import PostgresServer
from tests.servers.s3 import KEY_ID, REGION, S3Server
from tests.servers.services import ControllerProcess, ReplicatorProcess

IN_ENV, IN_FILE, LITERAL = "plant-env-Zq7vK2", "plant:file-Xw4tR9", "plant-literal-Jd8mP5"
FILE_ROTATED, WRONG = "plant:rotated-Bn3sL6", "plant-wrong-Hc6yT1"
PLANTED = (IN_ENV, IN_FILE, LITERAL, FILE_ROTATED, WRONG)
USER = "planted"


def forms(value: str) -> Iterator[bytes]:
    """As it is, and within base64, which has three phases."""
    yield value.encode()
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + value.encode())
        yield encoded[(4 if shift else 0) : -4]


class Tap:
    """Passes connections on to `target` and keeps what clients send."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.sent = bytearray()
        self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.2)
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(TimeoutError):
                here, _ = self._server.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(here,)))
                self._threads[-1].start()

    def _serve(self, here: socket.socket) -> None:
        host, _, port = self.target.rpartition(":")
        with here, contextlib.suppress(OSError):
            with socket.create_connection((host, int(port))) as there:
                while not self._closed:
                    ready, _, _ = select.select((here, there), (), (), 0.2)
                    for one in ready:
                        data = one.recv(65536)
                        if not data:
                            return
                        if one is here:
                            self.sent += data
                        (there if one is here else here).sendall(data)

    def close(self) -> None:
        self._closed = True
        for thread in self._threads:
            thread.join()
        self._server.close()


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    for phase in range(3):
        hidden = base64.b64encode(b"u" * phase + IN_ENV.encode() + b":more")
        assert found_in({"x": b"head " + hidden}) == {f"x: {IN_ENV}"}
    assert found_in({"x": json.dumps({"a": LITERAL}).encode()}) == {f"x: {LITERAL}"}
    assert found_in({"x": b"nothing"}) == set()


def found_in(produced: dict[str, bytes]) -> set[str]:
    return {
        f"{place}: {value}"
        for place, content in produced.items()
        for value in PLANTED
        if any(form in content for form in forms(value))
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sqlite", "etcd"])
def test_nothing_of_a_run_holds_a_secret(
    kind: str,
    nats_stack: Stack,
    postgres_server: PostgresServer,
    s3_server: S3Server,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    database, hidden = f"secret_{kind}", tmp_path_factory.mktemp("hidden")
    MilvusClient(uri=nats_stack.source.uri).create_database(database)
    source = MilvusClient(uri=nats_stack.source.uri, db_name=database)
    source.create_collection("books", dimension=4, auto_id=False)
    (hidden / "token").write_text(IN_FILE)
    for name in ("one", "two"):
        (hidden / name).write_bytes(base64.b64encode(os.urandom(32)))
    keys = [{"id": name, "file": str(hidden / name)} for name in ("one", "two")]
    store_server = EtcdServer(tmp_path / "etcd")
    debug = {"format": "json", "level": "debug"}
    options: dict[str, Any] = {"log": debug, "secretsKeys": keys[:1]}
    if kind == "etcd":
        store_server.start()
        options["store"] = {"etcd": {"endpoints": [store_server.endpoint], "leaseSeconds": 2}}

    postgres_server.make_database(database)
    with postgres_server.connect(database) as connection:
        connection.execute(f"CREATE ROLE {USER}_{kind} LOGIN SUPERUSER PASSWORD '{LITERAL}'")
    sink = task_pb2.Sink(
        postgres=sink_postgres_pb2.PostgresSink(
            host=postgres_server.host,
            port=postgres_server.port,
            database=database,
            user=f"{USER}_{kind}",
            password=secret_pb2.Secret(literal=LITERAL),
        )
    )
    bucket = s3_server.make_bucket()

    pair = Pair(nats_stack, tmp_path, replicators=0, **options)
    tap = Tap(pair.controller.address)
    replicator = ReplicatorProcess(
        tmp_path,
        tap.address,
        "replicator-0",
        env={"MILVUS_CDC_SECRET_S3": IN_ENV},
        secrets={"folders": [str(hidden)]},
        log=debug,
    )
    pair.replicators.append(replicator)
    produced: dict[str, bytes] = {}

    def keep(place: str, *messages: Any) -> None:
        for message in messages:
            produced[place] = produced.get(place, b"") + message.SerializeToString()
            produced[place] += str(message).encode()

    def refused(place: str, call: Any, request: Any) -> str:
        with pytest.raises(grpc.RpcError) as error:
            call(request, timeout=60)
        produced[place] = repr(error.value).encode() + str(error_info(error.value)).encode()
        return str(error_info(error.value).reason)

    with contextlib.closing(tap), pair:
        task = pair.task(f"{database}.*", sink=sink)
        task.source.milvus.token.file = str(hidden / "token")
        files = task.dead_letters.files
        files.uri, files.s3.endpoint = f"s3://{bucket}/letters", s3_server.endpoint
        files.s3.region = REGION
        files.s3.access_key_id.literal = LITERAL
        files.s3.secret_access_key.env = "MILVUS_CDC_SECRET_S3"
        wrong = api_pb.CreateTaskRequest(task=task)
        wrong.task.sink.postgres.password.literal = WRONG
        refused("a wrong password", pair.tasks.CreateTask, wrong)
        request = api_pb.CreateTaskRequest(task=task, validate_only=True)
        keep("validate_only", pair.tasks.CreateTask(request, timeout=60))
        request.validate_only = False
        keep("CreateTask", pair.tasks.CreateTask(request, timeout=60))
        pair.wait_running(f"{database}.books", seconds=90)
        rows = [
            {"id": n, "vector": [1.0, 2, 3, n], "text": "a\0b" if n == 7 else "x"}
            for n in range(20)
        ]
        source.insert("books", rows)
        pair.wait(
            "a dead letter", lambda: pair.collections()[f"{database}.books"].rows_refused == 1, 90
        )
        # The file is swapped, and the keys are rotated, while all of it runs.
        (hidden / "token").write_text(FILE_ROTATED)
        pair.wait("the token is taken", lambda: "token replaced" in replicator.log_path.read_text())
        pair.controller.stop()
        pair.controller = ControllerProcess(
            tmp_path, name="rotated", **options | {"secretsKeys": keys[::-1]}
        )
        tap.target = pair.controller.address
        pair.controller.start()
        source.insert("books", [{"id": 100, "vector": [0.0, 0, 0, 1], "text": "later"}])

        def arrived() -> bool:
            with postgres_server.connect(database) as connection:
                found = connection.execute(f"SELECT count(*) FROM {database}.books").fetchone()
            return found == (20,)

        pair.wait("rows go on", arrived, 90)
        shown = pair.get()
        assert shown.sink.postgres.password.sealed.key == "two"
        update = api_pb.UpdateTaskRequest(
            task=shown, update_mask=field_mask_pb2.FieldMask(paths=["dead_letters", "labels"])
        )
        update.task.labels["a"] = "b"
        keep("UpdateTask", pair.tasks.UpdateTask(update, timeout=60))
        update.task.dead_letters.files.uri += "/elsewhere"
        update.task.etag = ""
        assert refused("refused", pair.tasks.UpdateTask, update) == "SEALED_SECRET"
        pair.wait_running(f"{database}.books", seconds=90)
        keep("GetTask", pair.get())
        keep("ListTasks", pair.tasks.ListTasks(api_pb.ListTasksRequest()))
        watch = pair.tasks.WatchTasks(api_pb.WatchTasksRequest(), timeout=30)
        keep("WatchTasks", next(iter(watch)))
        watch.cancel()
        keep("ListTaskCollections", *pair.collections().values())
        keep("ListAssignments", *pair.assignments())
        keep(
            "ListReplicators",
            pair.fleet.ListReplicators(fleet_service_pb2.ListReplicatorsRequest()),
        )
        commands = (
            *("task get follow -o yaml", "task get follow -o json", "task list"),
            *("task positions follow", "task collections follow -o json", "task diff follow"),
            *("verify follow", "replicator list", "support dump"),
        )
        for command in commands:
            main([*command.split(), "--controller", pair.controller.address])
            out, err = capsys.readouterr()
            assert "sealed" in out or "task get" not in command
            produced[f"milvus-cdc {command}"] = f"{out}{err}".encode()
        for process in (pair.controller, replicator):
            with urllib.request.urlopen(process.metrics_url, timeout=10) as page:
                produced[f"metrics of {process.name}"] = page.read()
    store_server.stop()
    produced["reports of the replicator"] = bytes(tap.sent)
    s3 = boto3.client(
        "s3", endpoint_url=s3_server.endpoint, region_name=REGION,
        aws_access_key_id=KEY_ID, aws_secret_access_key="x",
    )  # fmt: skip
    for each in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        produced[each["Key"]] = s3.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
    s3.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            produced[str(path.relative_to(tmp_path))] = path.read_bytes()

    assert any(b"a\\u0000b" in content for place, content in produced.items() if "letters" in place)
    names = " ".join(produced)
    assert ("controller.db" if kind == "sqlite" else ".wal") in names
    assert all(name in names for name in ("controller.log", "rotated.log", "replicator-0.log"))
    assert b"sealed" in produced["milvus-cdc support dump"]
    assert b"replicator-0" in produced["reports of the replicator"]
    assert found_in(produced) == set()
    shutil.rmtree(hidden)
