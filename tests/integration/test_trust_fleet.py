"""Two controllers on one etcd and replicators as processes, with mutual TLS and credentials on
every hop of ours: users to a follower, controller to controller, replicator to controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from milvus_cdc.cli import main as command
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls
from milvuscdc.v1 import fleet_service_pb2

from tests.integration.controller_harness import task_message
from tests.servers import EtcdServer, many
from tests.servers.services import LEADER_LEASE_SECONDS, ControllerProcess, ReplicatorProcess
from tests.servers.trust_authority import Authority, Issued, hashed

LEADER = fleet_service_pb2.CONTROLLER_ROLE_LEADER
GRANTS = [
    {"name": "alice", "roles": ["admin"]},
    {"name": "victor", "roles": ["viewer"]},
    {"name": "replicator-a", "roles": ["replicator"], "replicator": "replicator-a"},
    {"name": "controllers", "roles": ["controller"]},
]


class Fleet:
    """`first` passes calls on or leads, `second` too."""

    def __init__(self, etcd: EtcdServer, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "ca")
        self.own = self.authority.issue("controllers")
        self.alice = self.authority.issue("alice")
        self.victor = self.authority.issue("victor")
        self.tokens = folder / "tokens.yaml"
        entry = {"sha256": hashed("by-token"), "name": "by-token", "roles": ["replicator"]}
        self.tokens.write_text(yaml.safe_dump({"tokens": [entry]}))
        self.endpoint = etcd.endpoint
        self.root = f"source-{uuid.uuid4()}"
        many.put_all(self.endpoint, many.cluster_keys(self.root))
        prefix = f"cdc-{uuid.uuid4()}"
        self.store = {
            "etcd": {
                "endpoints": [self.endpoint],
                "prefix": prefix,
                "leaseSeconds": LEADER_LEASE_SECONDS,
            }
        }
        self.controllers = [self.controller(f"controller-{n}", self.own) for n in (1, 2)]

    def controller(self, name: str, shown: Issued) -> ControllerProcess:
        return ControllerProcess(
            self.folder,
            store=self.store,
            name=name,
            credentials=self.own.credentials,
            tls=self.own.server,
            controllerTls=shown.client,
            auth={"certificates": GRANTS, "tokensFile": str(self.tokens)},
            # Audit lines are written whatever this says.
            log={"format": "json", "level": "error"},
        )

    def replicator(self, name: str, *, connected: bool = True, **other: Any) -> ReplicatorProcess:
        shown = self.authority.issue("replicator-a", file=f"{name}-client")
        settings = {
            "controllerTls": shown.client,
            "tls": self.own.server,
            "auth": {"certificates": GRANTS},
            **other,
        }
        return ReplicatorProcess(
            self.folder,
            [process.address for process in self.controllers],
            name,
            credentials=self.own.credentials,
            wait_connected=connected,
            **settings,
        )

    def client(self, process: ControllerProcess, issued: Issued) -> ControlClient:
        credentials = Credentials(tls=ClientTls.model_validate(issued.client))
        return ControlClient(process.address, timeout_seconds=20, credentials=credentials)

    async def leader(self) -> ControllerProcess:
        async with asyncio.timeout(30):
            while True:
                async with self.client(self.controllers[0], self.alice) as client:
                    with contextlib.suppress(ApiError):
                        known = await client.list_controllers()
                        for process in self.controllers:
                            for each in known:
                                if each.role == LEADER and each.address == process.address:
                                    return process
                await asyncio.sleep(0.1)

    async def follower(self) -> ControllerProcess:
        leader = await self.leader()
        return next(process for process in self.controllers if process is not leader)


@pytest.fixture(scope="module")
async def fleet(
    etcd_server: EtcdServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    fleet = Fleet(etcd_server, tmp_path_factory.mktemp("trust-fleet"))
    for process in fleet.controllers:
        process.spawn()
    try:
        for process in fleet.controllers:
            await asyncio.to_thread(process.wait_ready)
        yield fleet
    finally:
        for process in fleet.controllers:
            await asyncio.to_thread(process.stop)


def audited(process: ControllerProcess) -> list[dict[str, Any]]:
    found = []
    for line in process.log_path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == "audit":
                found.append(entry)
    return found


async def test_a_call_that_is_passed_on_keeps_its_caller(fleet: Fleet) -> None:
    leader, follower = await fleet.leader(), await fleet.follower()
    task = task_message("passed")
    task.source.etcd.endpoints[:] = [fleet.endpoint]
    task.source.etcd.root_path = fleet.root
    async with fleet.client(follower, fleet.alice) as alice:
        await alice.create_task(task)
    async with fleet.client(follower, fleet.victor) as victor:
        assert [each.name for each in await victor.list_tasks()] == ["tasks/passed"]
        with pytest.raises(ApiError) as refused:
            await victor.delete_task("passed")
        assert refused.value.reason == "ROLE_MISSING"
    async with fleet.client(leader, fleet.victor) as victor:
        with pytest.raises(ApiError, match="ROLE_MISSING"):
            await victor.delete_task("passed")
    lines = [
        (each["principal"], each["method"].rpartition("/")[2], each["resource"], each["code"])
        for each in audited(leader)
    ]
    assert ("alice", "CreateTask", "tasks/passed", "OK") in lines
    assert ("victor", "DeleteTask", "tasks/passed", "PERMISSION_DENIED") in lines
    passed = [each for each in audited(follower) if each.get("passed_on")]
    assert [(each["principal"], each["code"]) for each in passed] == [("alice", "OK")]
    by_alice = next(each for each in audited(leader) if each["principal"] == "alice")
    assert by_alice["origin"] == passed[0]["origin"], "where she is, not where the follower is"


async def test_a_controller_without_the_role_passes_nothing_on(fleet: Fleet) -> None:
    await fleet.leader()
    impostor = fleet.authority.issue("victor", file="impostor")
    third = fleet.controller("controller-3", impostor)
    await asyncio.to_thread(third.start)
    try:
        async with fleet.client(third, fleet.alice) as alice:
            with pytest.raises(ApiError) as refused:
                await alice.list_tasks()
        assert refused.value.reason == "NOT_A_CONTROLLER"
    finally:
        await asyncio.to_thread(third.stop)


async def test_replicators_show_who_they_are(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.leader()
    token = tmp_path / "token"
    token.write_text("by-token\n")
    right = fleet.replicator("replicator-a")
    by_token = fleet.replicator("replicator-b", controllerToken={"file": str(token)})
    misnamed = fleet.replicator("replicator-c", connected=False)
    plain = fleet.replicator("replicator-d", connected=False, controllerTls=None)
    foreign = Authority(tmp_path / "foreign").issue("replicator-a")
    shown = {**fleet.own.client, "certificateFile": str(foreign.certificate)}
    shown["keyFile"] = str(foreign.key)
    stranger = fleet.replicator("replicator-e", connected=False, controllerTls=shown)
    all_of_them = (right, by_token, misnamed, plain, stranger)
    for process in all_of_them:
        process.spawn()
    try:
        for process in all_of_them:
            await asyncio.to_thread(process.wait_ready)
        async with fleet.client(fleet.controllers[0], fleet.victor) as victor:
            there = {each.name for each in await victor.list_replicators()}
        assert there == {"replicators/replicator-a", "replicators/replicator-b"}
        await _until_log(misnamed, "REPLICATOR_NAME")
        await _until_log(plain, "controller not reachable")
        await _until_log(stranger, "controller not reachable")
        token.write_text("another")
        async with grpc.aio.secure_channel(right.address, fleet.own.credentials) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(service="replicator"), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await _reflect(channel)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with grpc.aio.secure_channel(right.address, fleet.victor.credentials) as channel:
            assert await _reflect(channel)
        async with grpc.aio.insecure_channel(right.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    finally:
        for process in all_of_them:
            await asyncio.to_thread(process.stop, 3)
    text = "".join(process.log_path.read_text() for process in (*all_of_them, *fleet.controllers))
    assert "by-token\\n" not in text
    assert "Bearer" not in text
    assert "PRIVATE KEY" not in text
    # Strangers can come as often as they like.
    assert "Handshake failed" not in text


async def _reflect(channel: grpc.aio.Channel) -> list[Any]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    return [answer async for answer in stub.ServerReflectionInfo(iter([ask]), timeout=10)]


async def _until_log(process: ReplicatorProcess, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in process.log_path.read_text():
            await asyncio.sleep(0.1)


async def test_the_command_shows_who_asks(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.leader()
    address = fleet.controllers[0].address
    ours = ["--ca-file", str(fleet.authority.file)]
    victor = ["--certificate-file", str(fleet.victor.certificate)]
    victor += ["--key-file", str(fleet.victor.key)]

    async def run(*options: str | Path, **environ: str) -> tuple[int, str]:
        given = ["task", "list", "--timeout", "10", "--controller", address, *map(str, options)]
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            code = await command._run(command.build_parser().parse_args(given))
        return code, capsys.readouterr().err

    assert (await run(*ours, *victor))[0] == 0
    by_environ = {
        "MILVUS_CDC_CA_FILE": str(fleet.authority.file),
        "MILVUS_CDC_CERTIFICATE_FILE": str(fleet.victor.certificate),
        "MILVUS_CDC_KEY_FILE": str(fleet.victor.key),
    }
    assert (await run(**by_environ))[0] == 0
    code, text = await run(**by_environ, MILVUS_CDC_TOKEN="wrong")
    assert code == 3
    assert "TOKEN_UNKNOWN" in text
    assert "--token-file" in text
    code, text = await run()
    assert code == 4
    assert "--tls" in text
    code, text = await run("--tls", *victor)
    assert code == 4
    assert "--ca-file" in text
    code, text = await run(*ours)
    assert code == 4
    code, text = await run(*ours, *victor[:2])
    assert code == 2
    assert "--key-file" in text
    code, text = await run("--ca-file", fleet.folder / "missing.pem")
    assert code == 2
    assert "missing.pem" in text


def test_what_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    tls = {**one.server, "keyFile": str(other.key)}
    controller, replicator = "milvus_cdc_controller.app", "milvus_cdc_replicator.app"
    for program, body, said in (
        (controller, {"tls": tls}, "tls.keyFile"),
        (controller, {"listen": "0.0.0.0:17999"}, "tls: is needed"),
        (replicator, {"tls": tls}, "tls.keyFile"),
    ):
        config = tmp_path / "config.yaml"
        store = {"store": {"sqlite": {"path": str(tmp_path / "c.db")}}}
        place = store if program == controller else {}
        listen = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0"}
        config.write_text(yaml.safe_dump({**place, **listen, **body}))
        done = subprocess.run(
            [sys.executable, "-m", program, "--config", str(config)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2, (body, done.stderr)
        assert said in done.stderr
