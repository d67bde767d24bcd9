"""Web tokens and static ones: what is wrong with one is said, keys are replaced while a controller
runs, and whoever is removed is out.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from milvus_cdc.control import ApiError, ControlClient
from milvus_cdc.errors import UserError
from milvus_cdc.trust import guard
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import TokenFrom

from tests.integration.trust_world import (
    World,
    reason_of,
    refused,
    until_reason,
)
from tests.servers.trust_authority import (
    AUDIENCE,
    ISSUER,
    Authority,
    Issuer,
)


async def test_web_tokens(world: World, address: str) -> None:
    issuer = world.issuer
    good = issuer.token(roles=["viewer"])
    assert await reason_of(world, address, good) == ""
    assert await reason_of(world, address, good) == "", "from the cache"
    assert await reason_of(world, address, issuer.token(roles="viewer admin")) == ""
    assert await reason_of(world, address, issuer.token(sub="service-account")) == ""
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
        assert await reason_of(world, address, token) == reason, reason


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
    assert await reason_of(world, address, before) == ""
    world.issuer.rotate("second")
    after = world.issuer.token(roles=["viewer"])
    assert await reason_of(world, address, after) == "TOKEN_KEY_UNKNOWN"
    world.write()
    await until_reason(world, address, after, "")
    assert await reason_of(world, address, before) == "TOKEN_KEY_UNKNOWN"
    world.jwks_file.write_bytes(b"nonsense")
    await asyncio.sleep(1.2)
    assert await reason_of(world, address, after) == "", "a bad file changes nothing"
    world.write()


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
        await until_reason(world, address, token, "")
        key_server.issuer.rotate("second")
        await asyncio.sleep(0.3)
        fresh = key_server.issuer.token(roles=["viewer"])
        assert await reason_of(world, address, fresh) == "", "an unknown key is asked for"
        assert await reason_of(world, address, token) == "TOKEN_KEY_UNKNOWN"
        key_server.down = True
        stranger = Issuer("third").token(roles=["viewer"])
        assert await reason_of(world, address, stranger) == "TOKEN_KEY_UNKNOWN"
        assert await reason_of(world, address, fresh) == "", "the last keys count"


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
        assert await reason_of(world, address, "leaver") == "TOKEN_UNKNOWN"


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
