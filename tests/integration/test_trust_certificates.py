"""Client certificates, and files of certificates that are replaced while a controller runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls
from milvuscdc.v1 import (
    task_service_pb2,
)

from tests.integration.controller_harness import task_message
from tests.integration.trust_world import (
    World,
    refused,
    replace_file,
)
from tests.servers.trust_authority import (
    Authority,
    Issued,
)


async def test_client_certificates(world: World, tmp_path: Path) -> None:
    authority = world.authority
    known = authority.issue("alice")
    by_uri = authority.issue("uri-holder", uris=["spiffe://cdc.test/operator"], file="by-uri")
    unknown = authority.issue("mallory")
    over = authority.issue("alice", days=-1, file="over")
    foreign = Authority(tmp_path / "other").issue("alice")
    mixed = Issued(authority.file, foreign.certificate, foreign.key)
    auth = {
        "tokensFile": str(world.tokens_file),
        "certificates": [
            {"name": "alice", "roles": ["viewer"]},
            {"name": "spiffe://cdc.test/operator", "roles": ["operator"]},
        ],
    }
    async with world.serving(tls=world.server.server, auth=auth) as address:
        for issued, answer in (
            (known, ("OK", "")),
            (by_uri, ("OK", "")),
            (unknown, ("UNAUTHENTICATED", "CERTIFICATE_UNKNOWN")),
            (over, ("UNAVAILABLE", "UNREACHABLE")),
            (mixed, ("UNAVAILABLE", "UNREACHABLE")),
            (None, ("UNAVAILABLE", "UNREACHABLE")),
        ):
            assert await refused(world.client(address, issued=issued)) == answer
        assert await refused(world.client(address, "token-of-admin")) == (
            "UNAVAILABLE", "UNREACHABLE",
        ), "a token alone does not open a port that wants a certificate"  # fmt: skip
        async with world.client(address, issued=known) as client:
            with pytest.raises(ApiError, match="roles admin, operator"):
                await client.pause_task("none")
        async with world.client(address, "token-of-operator", known) as client:
            with pytest.raises(ApiError) as there:
                await client.pause_task("none")
            assert there.value.reason == "TASK_NOT_FOUND", "the token that is shown decides"
        wrong = world.client(address, "token-of-nobody", known)
        assert await refused(wrong) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")


async def test_certificates_are_replaced_while_streams_go_on(world: World, tmp_path: Path) -> None:
    first, second = Authority(tmp_path / "1"), Authority(tmp_path / "2")
    issued = first.issue("controller")
    tls = {"certificateFile": str(issued.certificate), "keyFile": str(issued.key)}

    async def opens(address: str, authority: Authority) -> bool:
        credentials = Credentials(tls=ClientTls(ca_file=authority.file), token="token-of-admin")
        client = ControlClient(address, timeout_seconds=4, credentials=credentials)
        return await refused(client) == ("OK", "")

    async with world.serving(tls=tls) as address:
        ca_file = tmp_path / "trusted.pem"
        ca_file.write_bytes(first.file.read_bytes())
        credentials = Credentials(tls=ClientTls(ca_file=ca_file), token="token-of-admin")
        async with ControlClient(address, credentials=credentials) as client:
            events = client.watch_tasks()
            begun = await anext(events)
            assert begun.type == task_service_pb2.WatchTasksResponse.TYPE_BOOKMARK
            fresh = second.issue("controller")
            # The certificate first: until its key comes, the pair before stays in use.
            replace_file(issued.certificate, fresh.certificate.read_bytes())
            assert await opens(address, first)
            assert not await opens(address, second)
            replace_file(issued.key, fresh.key.read_bytes())
            assert await opens(address, second)
            assert not await opens(address, first)
            issued.certificate.write_bytes(b"no certificate")
            assert await opens(address, second), "a bad file changes nothing"
            other = Credentials(tls=ClientTls(ca_file=second.file), token="token-of-admin")
            async with ControlClient(address, credentials=other) as new:
                await new.create_task(task_message("seen"))
            async with asyncio.timeout(20):
                seen = await anext(events)
            assert seen.task.name == "tasks/seen", "the stream of before goes on"
            # A client's own files count from its next connection on.
            replace_file(ca_file, second.file.read_bytes())
            assert [task.name for task in await client.list_tasks()] == ["tasks/seen"]
            await events.aclose()  # type: ignore[attr-defined]


async def test_a_replaced_client_certificate_is_used_next(world: World) -> None:
    issued = world.authority.issue("before", file="replaced")
    auth = {"certificates": [{"name": "after", "roles": ["viewer"]}]}
    async with world.serving(tls=world.server.server, auth=auth) as address:
        async with world.client(address, issued=issued) as client:
            with pytest.raises(ApiError, match="before"):
                await client.list_tasks()
            world.authority.issue("after", file="replaced")
            assert await client.list_tasks() == []
