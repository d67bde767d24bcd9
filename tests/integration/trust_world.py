"""A controller that listens with TLS and asks who calls, with everything that it can be asked to
check.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.trust.caller import Role
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.server import Running, serve
from milvus_cdc_controller.store.sqlite import SqliteStore

from tests.integration.controller_harness import HandFedSource, collection
from tests.servers.trust_authority import (
    AUDIENCE,
    ISSUER,
    Authority,
    Issued,
    Issuer,
    hashed,
)

PEOPLE = ("viewer", "operator", "admin")


class World:
    """One controller with everything that it can be asked to check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "ca")
        self.server = self.authority.issue("controller.cdc")
        self.issuer = Issuer()
        self.tokens: dict[str, dict[str, Any]] = {
            **{f"token-of-{role}": {"name": f"a-{role}", "roles": [str(role)]} for role in Role},
            "bound": {"name": "bound", "roles": ["replicator"], "replicator": "replicator-1"},
        }
        self.tokens_file = folder / "tokens.yaml"
        self.jwks_file = folder / "jwks.json"
        self.write()
        self.running: Running | None = None

    def write(self) -> None:
        """What is replaced in one step, as people should."""
        entries = [{"sha256": hashed(token), **what} for token, what in self.tokens.items()]
        replace_file(self.tokens_file, yaml.safe_dump({"tokens": entries}).encode())
        replace_file(self.jwks_file, self.issuer.jwks())

    def settings(self, **other: Any) -> dict[str, Any]:
        tls = {k: v for k, v in self.server.server.items() if k != "clientCaFile"}
        web = {"issuer": ISSUER, "audience": AUDIENCE, "jwksFile": str(self.jwks_file)}
        subjects = [{"name": "service-account", "roles": ["viewer"]}]
        return {
            "listen": "127.0.0.1:0",
            "metrics": None,
            "tls": tls,
            "auth": {
                "tokensFile": str(self.tokens_file),
                "jwt": {**web, "leewaySeconds": 0, "subjects": subjects},
            },
            **other,
        }

    @asynccontextmanager
    async def serving(self, *, path: Path | None = None, **other: Any) -> AsyncIterator[str]:
        """On a store of its own unless `path` names one."""
        store = await SqliteStore.open(path or self.folder / f"{os.urandom(4).hex()}.db")
        config = Config.model_validate(self.settings(**other))
        assert config.fault() is None
        source = HandFedSource(collection(1))
        try:
            async with serve(config, store, source.connect) as running:
                self.running = running
                yield f"127.0.0.1:{running.port}"
        finally:
            await store.close()

    def client(self, address: str, token: str = "", issued: Issued | None = None) -> ControlClient:
        tls = ClientTls.model_validate(
            issued.client if issued else {"caFile": str(self.authority.file)}
        )
        credentials = Credentials(tls=tls, token=token)
        return ControlClient(address, timeout_seconds=20, credentials=credentials)


def replace_file(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


async def refused(client: ControlClient) -> tuple[str, str]:
    """The answer to a read: code and reason."""
    async with client:
        try:
            await client.list_tasks()
        except ApiError as error:
            return error.code.name, error.reason
    return "OK", ""


async def reason_of(world: World, address: str, token: str) -> str:
    return (await refused(world.client(address, token)))[1]


async def until_reason(world: World, address: str, token: str, reason: str) -> None:
    async with asyncio.timeout(20):
        while await reason_of(world, address, token) != reason:
            await asyncio.sleep(0.2)
