"""What each role may, by calling every method there is."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from milvus_cdc.control.refusal import api_error as said
from milvus_cdc.trust.caller import Caller, Role
from milvus_cdc_controller.access import METHODS
from milvus_cdc_controller.forwarding import CALLER, HOP, PEER
from milvus_cdc_controller.server import SERVICES
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import (
    replication_service_pb2_grpc,
    task_service_pb2,
    task_service_pb2_grpc,
)

from tests.integration.trust_world import (
    PEOPLE,
    World,
    refused,
)

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


def _methods() -> dict[str, Any]:
    pool = descriptor_pool.Default()
    return {
        f"/{service}/{method.name}": method
        for service in SERVICES
        for method in pool.FindServiceByName(service).methods
    }


def test_every_method_has_its_roles() -> None:
    assert set(_methods()) <= set(METHODS), "a method without an entry is for nobody"
    served = {name for name in METHODS if name.startswith("/milvuscdc")}
    assert served == set(_methods()), "an entry for a method that is not there"


def test_the_table_knows_what_is_a_stream() -> None:
    for name, method in _methods().items():
        streams = method.client_streaming or method.server_streaming
        assert METHODS[name].streams == streams, name


def test_the_documented_roles_are_the_real_ones() -> None:
    rows = re.findall(r"^\| `([A-Za-z.]+)` \|(.*)\|$", SECURITY.read_text(), re.MULTILINE)
    columns = [*PEOPLE, "replicator"]
    documented = {
        f"/milvuscdc.v1.{name.replace('.', '/')}": {
            role for role, mark in zip(columns, cells.split("|"), strict=False) if "x" in mark
        }
        for name, cells in rows
        if name.split(".")[0] + "." in ("TaskService.", "FleetService.", "ReplicationService.")
    }
    assert documented == {name: set(METHODS[name].roles) for name in _methods()}


@pytest.mark.parametrize("role", [*Role, "nobody"])
async def test_each_role_may_what_the_table_says(world: World, address: str, role: str) -> None:
    """By calling all of them with an empty message: past the guard it is refused for other
    reasons, or answered.
    """
    token = f"token-of-{role}"
    async with grpc.aio.secure_channel(address, world.authority.trusted) as channel:

        async def code(name: str) -> str:
            stub: Any = channel.stream_stream(name)
            call = stub(iter([b""]), metadata=(("authorization", f"Bearer {token}"),), timeout=5)
            try:
                async for _ in call:
                    return "PASSED"
            except grpc.aio.AioRpcError as error:
                known = said(error).reason in ("ROLE_MISSING", "TOKEN_UNKNOWN")
                return error.code().name if known else "PASSED"
            finally:
                call.cancel()
            return "PASSED"

        names = list(_methods())
        codes = await asyncio.gather(*map(code, names))
        for name, found in zip(names, codes, strict=True):
            wanted = "PASSED" if role in METHODS[name].roles else "PERMISSION_DENIED"
            assert found == ("UNAUTHENTICATED" if role == "nobody" else wanted), name


async def test_a_method_without_an_entry_is_for_nobody(
    world: World, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = dict(METHODS)
    del rules["/milvuscdc.v1.TaskService/ListTasks"]
    monkeypatch.setattr("milvus_cdc_controller.access.METHODS", rules)
    async with world.serving() as another:
        refusal = await refused(world.client(another, "token-of-admin"))
    assert refusal == ("PERMISSION_DENIED", "METHOD_FOR_NOBODY")


async def test_a_replicator_speaks_for_itself_alone(world: World, address: str) -> None:
    async with grpc.aio.secure_channel(address, world.authority.trusted) as channel:
        stub: Any = replication_service_pb2_grpc.ReplicationServiceStub(channel)

        async def connect(token: str, name: str) -> str:
            call = stub.Connect(metadata=(("authorization", f"Bearer {token}"),), timeout=10)
            hello = pb.Hello(
                name=name, instance_id=os.urandom(8).hex(), protocol_min=1, protocol_max=1
            )
            try:
                await call.write(pb.ConnectRequest(hello=hello))
                answer = await call.read()
                return str(answer.WhichOneof("message"))
            except grpc.aio.AioRpcError as error:
                return said(error).reason
            finally:
                call.cancel()

        assert await connect("bound", "replicator-1") == "welcome"
        assert await connect("bound", "replicator-2") == "REPLICATOR_NAME"
        assert await connect("token-of-replicator", "replicator-2") == "welcome"
        assert await connect("token-of-admin", "replicator-2") == "ROLE_MISSING"


async def test_only_a_controller_says_on_whose_behalf_it_calls(world: World, address: str) -> None:
    admin = Caller("somebody-else", "token", frozenset((Role.ADMIN,))).told()
    asked = ((HOP, "me"), (PEER, "ipv4:10.0.0.1:1"), (CALLER, admin))
    async with grpc.aio.secure_channel(address, world.authority.trusted) as channel:
        stub: Any = task_service_pb2_grpc.TaskServiceStub(channel)

        async def delete(token: str, metadata: Any) -> str:
            request = task_service_pb2.DeleteTaskRequest(name="tasks/none", allow_missing=True)
            shown = (("authorization", f"Bearer {token}"),)
            try:
                await stub.DeleteTask(request, metadata=(*shown, *metadata))
            except grpc.aio.AioRpcError as error:
                return said(error).reason
            return "done"

        assert await delete("token-of-controller", asked) == "done"
        for role in (*PEOPLE, "replicator"):
            assert await delete(f"token-of-{role}", asked) == "NOT_A_CONTROLLER"
            for one in asked:
                assert await delete(f"token-of-{role}", (one,)) == "NOT_A_CONTROLLER"
        assert await delete("token-of-nobody", asked) == "HOP_REFUSED"
        assert await delete("token-of-controller", ()) == "ROLE_MISSING", "it is nobody itself"
        assert await delete("token-of-controller", ((HOP, "me"),)) == "HOP_REFUSED"
