"""A controller that listens with TLS and asks who calls: the right and the wrong credential on the
wire, what each role may, and what changes while it runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import structlog
import yaml
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.control.refusal import api_error as said
from milvus_cdc.errors import UserError
from milvus_cdc.trust import guard
from milvus_cdc.trust.caller import ANYBODY, Caller, Role
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls, TokenFrom
from milvus_cdc_controller.access import METHODS
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.forwarding import CALLER, HOP, PEER
from milvus_cdc_controller.server import SERVICES, Running, serve
from milvus_cdc_controller.store.sqlite import SqliteStore
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import (
    replication_service_pb2_grpc,
    task_service_pb2,
    task_service_pb2_grpc,
)

from tests.integration.controller_harness import HandFedSource, collection, task_message
from tests.servers.trust_authority import (
    AUDIENCE,
    ISSUER,
    Authority,
    Issued,
    Issuer,
    hashed,
)

PEOPLE = ("viewer", "operator", "admin")
SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


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
        _replace(self.tokens_file, yaml.safe_dump({"tokens": entries}).encode())
        _replace(self.jwks_file, self.issuer.jwks())

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
    async def serving(self, **other: Any) -> AsyncIterator[str]:
        store = await SqliteStore.open(self.folder / f"{os.urandom(4).hex()}.db")
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


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
async def address(world: World) -> AsyncIterator[str]:
    async with world.serving() as address:
        yield address


async def refused(client: ControlClient) -> tuple[str, str]:
    """The answer to a read: code and reason."""
    async with client:
        try:
            await client.list_tasks()
        except ApiError as error:
            return error.code.name, error.reason
    return "OK", ""


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


# ---- roles


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


# ---- web tokens


async def _reason(world: World, address: str, token: str) -> str:
    return (await refused(world.client(address, token)))[1]


async def test_web_tokens(world: World, address: str) -> None:
    issuer = world.issuer
    good = issuer.token(roles=["viewer"])
    assert await _reason(world, address, good) == ""
    assert await _reason(world, address, good) == "", "from the cache"
    assert await _reason(world, address, issuer.token(roles="viewer admin")) == ""
    assert await _reason(world, address, issuer.token(sub="service-account")) == ""
    stranger = Issuer()
    public = issuer.public_pem()
    confused = json.dumps({"alg": "HS256", "typ": "JWT", "kid": "first"}).encode()
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "exp": 2**33, "roles": ["admin"]}
    for token, reason in {
        issuer.token(roles=["viewer"], seconds=-5): "TOKEN_EXPIRED",
        issuer.token(roles=["viewer"], aud="another"): "TOKEN_AUDIENCE",
        issuer.token(roles=["viewer"], iss="https://another.test"): "TOKEN_ISSUER",
        issuer.token(roles=["viewer"], nbf=2**33): "TOKEN_TOO_EARLY",
        issuer.token(roles=["viewer"], exp=None): "TOKEN_INVALID",
        issuer.token(roles=["viewer"], aud=None): "TOKEN_INVALID",
        issuer.token(roles=["viewer"], sub=None): "TOKEN_INVALID",
        issuer.token(roles=["king"]): "ROLE_MISSING",
        issuer.token(): "ROLE_MISSING",
        stranger.token(roles=["viewer"]): "TOKEN_INVALID",
        jwt.encode(claims, "", algorithm="none"): "TOKEN_ALGORITHM",
        _hmac(confused, claims, public): "TOKEN_ALGORITHM",
        good[:-6] + "AAAAAA": "TOKEN_INVALID",
    }.items():
        assert await _reason(world, address, token) == reason, reason


def _hmac(header: bytes, claims: dict[str, Any], key: bytes) -> str:
    """What a library that believes the token's header would take: signed with what all know."""
    import base64
    import hashlib
    import hmac

    def part(content: bytes) -> bytes:
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    text = part(header) + b"." + part(json.dumps(claims).encode())
    return (text + b"." + part(hmac.new(key, text, hashlib.sha256).digest())).decode()


async def test_keys_of_tokens_are_replaced_in_their_file(world: World, address: str) -> None:
    before = world.issuer.token(roles=["viewer"])
    assert await _reason(world, address, before) == ""
    world.issuer.rotate("second")
    after = world.issuer.token(roles=["viewer"])
    assert await _reason(world, address, after) == "TOKEN_KEY_UNKNOWN"
    world.write()
    await _until_reason(world, address, after, "")
    assert await _reason(world, address, before) == "TOKEN_KEY_UNKNOWN"
    world.jwks_file.write_bytes(b"nonsense")
    await asyncio.sleep(1.2)
    assert await _reason(world, address, after) == "", "a bad file changes nothing"
    world.write()


async def _until_reason(world: World, address: str, token: str, reason: str) -> None:
    async with asyncio.timeout(20):
        while await _reason(world, address, token) != reason:
            await asyncio.sleep(0.2)


class _KeyServer(HTTPServer):
    issuer: Issuer
    down = False


class _KeyHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        self.send_response(500 if server.down else 200)
        self.end_headers()
        self.wfile.write(server.issuer.jwks())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def key_server(world: World) -> Iterator[_KeyServer]:
    server = _KeyServer(("127.0.0.1", 0), _KeyHandler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(world.server.certificate, world.server.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.issuer = Issuer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def test_keys_of_tokens_come_from_an_address(
    world: World, key_server: _KeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc.trust.key_sets.AGAIN_SECONDS", 0.2)
    url = f"https://127.0.0.1:{key_server.server_port}/keys"
    web: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE, "jwksUrl": url}
    foreign = Authority(tmp_path).file
    async with world.serving(auth={"jwt": {**web, "jwksCaFile": str(foreign)}}) as address:
        answer = await refused(world.client(address, key_server.issuer.token(roles=["viewer"])))
        assert answer == ("UNAVAILABLE", "JWKS_UNAVAILABLE"), "not of the issuer's authority"
    key_server.down = True
    web["jwksCaFile"] = str(world.authority.file)
    async with world.serving(auth={"jwt": web}) as address:
        token = key_server.issuer.token(roles=["viewer"])
        answer = await refused(world.client(address, token))
        assert answer == ("UNAVAILABLE", "JWKS_UNAVAILABLE")
        key_server.down = False
        await _until_reason(world, address, token, "")
        key_server.issuer.rotate("second")
        await asyncio.sleep(0.3)
        fresh = key_server.issuer.token(roles=["viewer"])
        assert await _reason(world, address, fresh) == "", "an unknown key is asked for"
        assert await _reason(world, address, token) == "TOKEN_KEY_UNKNOWN"
        key_server.down = True
        stranger = Issuer("third").token(roles=["viewer"])
        assert await _reason(world, address, stranger) == "TOKEN_KEY_UNKNOWN"
        assert await _reason(world, address, fresh) == "", "the last keys count"


# ---- certificates


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
            _replace(issued.certificate, fresh.certificate.read_bytes())
            assert await opens(address, first)
            assert not await opens(address, second)
            _replace(issued.key, fresh.key.read_bytes())
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
            _replace(ca_file, second.file.read_bytes())
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


async def test_who_is_removed_is_out_and_so_are_his_streams(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "RECHECK_SECONDS", 0.3)
    world.tokens["leaver"] = {"name": "leaver", "roles": ["viewer"]}
    world.write()
    async with world.serving() as address:
        async with world.client(address, "leaver") as client:
            events = client.watch_tasks()
            await anext(events)
            del world.tokens["leaver"]
            world.write()
            with pytest.raises(ApiError) as ended:
                async with asyncio.timeout(20):
                    await anext(events)
            assert ended.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert await _reason(world, address, "leaver") == "TOKEN_UNKNOWN"


# ---- audit


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


# ---- files


async def test_a_token_does_not_travel_in_clear(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    token = TokenFrom(file=file)
    here = ControlClient("127.0.0.1:1", credentials=Credentials(token_from=token))
    await here.close()
    with pytest.raises(UserError, match="TOKEN_IN_CLEAR"):
        ControlClient("cdc.example:7070", credentials=Credentials(token_from=token))
    meant = ControlClient(
        "cdc.example:7070", credentials=Credentials(token_from=token, insecure=True)
    )
    await meant.close()
    assert Credentials(token_from=token).metadata() == (("authorization", "Bearer secret"),)
