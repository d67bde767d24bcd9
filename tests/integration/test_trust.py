"""A controller that listens with TLS and asks who calls: the right and the wrong credential on the
wire, and what is written down about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.trust.caller import ANYBODY, Role
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls
from milvus_cdc_controller.server import SERVICES

from tests.integration.controller_harness import task_message
from tests.integration.trust_world import (
    PEOPLE,
    World,
    refused,
)
from tests.servers.trust_authority import (
    Authority,
)


@pytest.mark.parametrize("role", PEOPLE)
async def test_a_token_opens(world: World, address: str, role: str) -> None:
    assert await refused(world.client(address, f"token-of-{role}")) == ("OK", "")


async def test_no_or_a_wrong_token_does_not(world: World, address: str) -> None:
    assert await refused(world.client(address)) == ("UNAUTHENTICATED", "CREDENTIAL_MISSING")
    wrong = world.client(address, "token-of-nobody")
    assert await refused(wrong) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
    other = world.client(address, "token-of-replicator")
    async with other:
        with pytest.raises(ApiError) as missing:
            await other.list_tasks()
    assert missing.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert missing.value.reason == "ROLE_MISSING"
    assert "/milvuscdc.v1.TaskService/ListTasks" in missing.value.message
    assert missing.value.metadata["roles"] == "admin, operator, viewer"


async def test_what_is_not_tls_or_not_its_authority_meets_nothing(
    world: World, address: str, tmp_path: Path
) -> None:
    assert await refused(ControlClient(address, timeout_seconds=5)) == (
        "UNAVAILABLE", "UNREACHABLE",
    )  # fmt: skip
    foreign = Credentials(tls=ClientTls(ca_file=Authority(tmp_path).file), token="token-of-admin")
    assert await refused(ControlClient(address, timeout_seconds=5, credentials=foreign)) == (
        "UNAVAILABLE", "UNREACHABLE",
    )  # fmt: skip
    misnamed = ClientTls(ca_file=world.authority.file, server_name="another.cdc")
    client = ControlClient(
        address, timeout_seconds=5, credentials=Credentials(tls=misnamed, token="token-of-admin")
    )
    assert await refused(client) == ("UNAVAILABLE", "UNREACHABLE")


async def test_health_is_open_and_reflection_is_for_viewers(world: World, address: str) -> None:
    async with grpc.aio.secure_channel(address, world.authority.trusted) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def services(token: str) -> list[str]:
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            call = reflection.ServerReflectionInfo(iter([ask]), metadata=metadata)
            return [s.name async for a in call for s in a.list_services_response.service]

        assert set(SERVICES) <= set(await services("token-of-viewer"))
        for token, code in (
            ("", grpc.StatusCode.UNAUTHENTICATED),
            ("token-of-replicator", grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await services(token)
            assert refusal.value.code() is code


async def test_changes_and_refusals_are_audited(world: World, address: str) -> None:
    lines: list[dict[str, Any]] = []
    structlog.configure(processors=[lambda _l, _n, event: _keep(lines, event)])
    try:
        async with world.client(address, "token-of-admin") as admin:
            await admin.create_task(task_message("audited"))
            await admin.list_tasks()
            with pytest.raises(ApiError):
                await admin.pause_task("missing")
        async with world.client(address, "token-of-viewer") as viewer:
            with pytest.raises(ApiError):
                await viewer.delete_task("audited")
        async with world.client(address, "token-of-nobody") as nobody:
            with pytest.raises(ApiError):
                await nobody.list_tasks()
    finally:
        structlog.reset_defaults()
    found = [line for line in lines if line["event"] == "audit"]
    keys = ("principal", "by", "method", "resource", "code", "reason")
    service = "/milvuscdc.v1.TaskService/"
    assert [tuple(line.get(key, "") for key in keys) for line in found] == [
        ("a-admin", "token", service + "CreateTask", "tasks/audited", "OK", ""),
        ("a-admin", "token", service + "PauseTask", "tasks/missing", "NOT_FOUND",
         "TASK_NOT_FOUND"),
        ("a-viewer", "token", service + "DeleteTask", "tasks/audited", "PERMISSION_DENIED",
         "ROLE_MISSING"),
        ("", "", service + "ListTasks", "", "UNAUTHENTICATED", "TOKEN_UNKNOWN"),
    ]  # fmt: skip
    assert all(line["origin"].startswith("ipv4:127.0.0.1:") for line in found)
    assert "token-of" not in str(lines)


def _keep(lines: list[dict[str, Any]], event: Any) -> Any:
    lines.append(dict(event))
    raise structlog.DropEvent


async def test_without_settings_everybody_may_everything(world: World) -> None:
    async with world.serving(tls=None, auth=None) as address:
        async with ControlClient(address) as client:
            await client.create_task(task_message("open"))
            await client.delete_task("open")
    assert ANYBODY.roles == set(Role) - {Role.CONTROLLER}
