"""A controller process whose own etcd, or whose source's, wants a certificate and a login."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvus_cdc.errors import UserError
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.server import Elected
from milvuscdc.v1 import secret_pb2, task_pb2, task_service_pb2, task_service_pb2_grpc, tls_pb2

from tests.e2e.pair import error_info
from tests.servers import EtcdServer, Pair
from tests.servers.services import ControllerProcess

PASSWORD = "MILVUS_CDC_SECRET_ETCD"


@pytest.fixture(scope="module")
def client(secured_etcd: EtcdServer) -> Pair:
    assert secured_etcd.authority is not None
    return secured_etcd.authority.issue("controller")


def store(server: EtcdServer, client: Pair, **changes: Any) -> dict[str, Any]:
    assert server.authority is not None
    tls = {
        "caFile": str(server.authority.ca_file),
        "certificateFile": str(client.certificate),
        "keyFile": str(client.key),
    }
    etcd: dict[str, Any] = {
        "endpoints": [server.endpoint],
        "prefix": "secured-controller",
        "leaseSeconds": 2,
        "username": "cdc",
        "tls": {**tls, **changes.pop("tls", {})},
        **changes,
    }
    return {"etcd": etcd}


@pytest.fixture(scope="module")
def controller(
    tmp_path_factory: pytest.TempPathFactory, secured_etcd: EtcdServer, client: Pair
) -> Iterator[ControllerProcess]:
    """On the secured etcd, its password in a file."""
    folder = tmp_path_factory.mktemp("secured-controller")
    password = folder / "password"
    password.write_text(f"{secured_etcd.users['cdc']}\n")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as variables:
        variables.setenv(PASSWORD, secured_etcd.users["cdc"])
        variables.setenv(f"{PASSWORD}_WRONG", "wrong horse")
        process = ControllerProcess(
            folder, store=store(secured_etcd, client, password={"file": str(password)})
        )
        with process:
            yield process


def test_it_leads_on_a_secured_etcd(controller: ControllerProcess) -> None:
    with grpc.insecure_channel(controller.address) as channel:
        tasks = task_service_pb2_grpc.TaskServiceStub(channel)
        assert not tasks.ListTasks(task_service_pb2.ListTasksRequest(), timeout=10).tasks


def test_a_wrong_password_ends_it(
    tmp_path: Path, secured_etcd: EtcdServer, client: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "wrong horse")
    process = ControllerProcess(
        tmp_path, store=store(secured_etcd, client, password={"env": "WRONG"})
    )
    process.spawn()
    deadline = time.monotonic() + 60
    while process.running and time.monotonic() < deadline:
        time.sleep(0.1)
    code, log = process.returncode, process.log_path.read_text()
    process.stop()
    assert code == 2, log
    assert "ETCD_AUTH: store.etcd.password: " in log
    assert "wrong horse" not in log


@pytest.mark.parametrize(
    ("tls", "password", "reason", "key"),
    [
        ({}, {"file": "/no/such"}, "SECRET_MISSING", "password"),
        ({"caFile": "/no/such"}, {"env": "HOME"}, "TLS_FILE_UNUSABLE", "tls.caFile"),
        (
            {"certificateFile": "", "keyFile": ""},
            {"env": "HOME"},
            "TLS_CLIENT_REFUSED",
            "tls.certificateFile",
        ),
        (None, {"env": "HOME"}, "TLS_NEEDED", "tls"),
    ],
)
async def test_what_is_wrong_with_its_own_etcd_is_named_by_its_key(
    secured_etcd: EtcdServer,
    client: Pair,
    tls: dict[str, str] | None,
    password: dict[str, str],
    reason: str,
    key: str,
) -> None:
    settings = store(secured_etcd, client, password=password, tls=tls or {})
    if tls is None:
        del settings["etcd"]["tls"]
    config = Config.model_validate({"listen": "127.0.0.1:0", "metrics": None, "store": settings})
    async with asyncio.timeout(60):
        with pytest.raises(UserError) as refused:
            await Elected(config).run(asyncio.Event())
    assert (refused.value.reason, refused.value.field) == (reason, f"store.etcd.{key}")
    assert f"store.etcd.{key}: " in refused.value.message


def source(server: EtcdServer, client: Pair, **login: Any) -> task_pb2.Source:
    assert server.authority is not None
    return task_pb2.Source(
        etcd=task_pb2.EtcdMetadata(
            endpoints=[server.endpoint],
            root_path="no-milvus-here",
            tls=tls_pb2.Tls(
                ca_file=str(server.authority.ca_file),
                certificate_file=str(client.certificate),
                key_file=str(client.key),
            ),
            **login,
        ),
        nats=task_pb2.NatsQueue(url="nats://127.0.0.1:1"),
    )


@pytest.mark.parametrize(
    ("secret", "reason", "field"),
    [
        # Let in, it finds that no Milvus keeps its metadata there.
        (PASSWORD, "SOURCE_METADATA_MISSING", "task.source.etcd.root_path"),
        (f"{PASSWORD}_WRONG", "ETCD_AUTH", "task.source.etcd.password"),
        (f"{PASSWORD}_UNSET", "SECRET_MISSING", "task.source.etcd.password"),
        ("HOME", "SECRET_NOT_ALLOWED", "task.source.etcd.password"),
    ],
)
def test_a_sources_etcd_is_logged_in_to_by_the_controller(
    controller: ControllerProcess,
    secured_etcd: EtcdServer,
    client: Pair,
    secret: str,
    reason: str,
    field: str,
) -> None:
    task = task_pb2.Task(
        name="tasks/secured",
        source=source(secured_etcd, client, username="cdc", password=secret_pb2.Secret(env=secret)),
        sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
        selection=task_pb2.Selection(include=["default.*"]),
        start=task_pb2.Start(earliest=task_pb2.Earliest()),
    )
    with grpc.insecure_channel(controller.address) as channel:
        tasks = task_service_pb2_grpc.TaskServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60)
    info = error_info(refused.value)
    assert (info.reason, info.metadata["field"]) == (reason, field)
    if secret == "HOME":
        assert "this controller allows" in str(refused.value.details())


def _no_password(task: task_pb2.Task) -> None:
    task.source.etcd.ClearField("password")


def _no_username(task: task_pb2.Task) -> None:
    task.source.etcd.username = ""


def _half_a_certificate(task: task_pb2.Task) -> None:
    task.source.etcd.tls.key_file = ""


def _tls_without_https(task: task_pb2.Task) -> None:
    task.sink.milvus.tls.ca_file = "/some/ca.pem"


def _half_at_the_sink(task: task_pb2.Task) -> None:
    task.sink.milvus.uri = "https://127.0.0.1:1"
    task.sink.milvus.tls.key_file = "/some/key.pem"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_no_password, "task.source.etcd.password"),
        (_no_username, "task.source.etcd.username"),
        (_half_a_certificate, "task.source.etcd.tls.key_file"),
        (_tls_without_https, "task.sink.milvus.tls"),
        (_half_at_the_sink, "task.sink.milvus.tls.certificate_file"),
    ],
)
def test_what_cannot_be_meant_so_is_refused_at_once(
    controller: ControllerProcess, secured_etcd: EtcdServer, client: Pair, change: Any, field: str
) -> None:
    task = task_pb2.Task(
        name="tasks/secured",
        source=source(
            secured_etcd, client, username="cdc", password=secret_pb2.Secret(env=PASSWORD)
        ),
        sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
        selection=task_pb2.Selection(include=["default.*"]),
        start=task_pb2.Start(earliest=task_pb2.Earliest()),
    )
    change(task)
    with grpc.insecure_channel(controller.address) as channel:
        tasks = task_service_pb2_grpc.TaskServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60)
    info = error_info(refused.value)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (info.reason, info.metadata["field"]) == ("INVALID_FIELD", field)
