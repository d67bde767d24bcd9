"""Logins of a source on Pulsar, each right and wrong, on a broker that asks for one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pulsar
import pytest
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import LogSource, PulsarConfig
from milvus_cdc.source.registry import open_source
from milvuscdc.v1 import secret_pb2, task_pb2, tls_pb2

from tests.contract.identity_provider import Provider, openid_provider
from tests.contract.test_sources import MANY, payloads, read_all
from tests.servers import PulsarServer
from tests.servers.certificates import Authority
from tests.servers.pulsar_security import PulsarSecurity

pytestmark = pytest.mark.pulsar


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, pulsar_available: None
) -> Iterator[PulsarServer]:
    """`reader` may consume in public/default, where one topic holds one message."""
    with PulsarServer(tmp_path_factory.mktemp("guarded-pulsar"), secured=True) as server:
        server.retain(-1)
        server.admin("POST", "namespaces/public/default/permissions/reader", ["consume"])
        server.admin("PUT", f"persistent/public/default/{TOPIC}")
        yield server


TOPIC = "by-dev-rootcoord-dml_0"


def security(server: PulsarServer) -> PulsarSecurity:
    assert server.security is not None
    return server.security


def plain(server: PulsarServer, token: str | None, *, admin: bool) -> PulsarConfig:
    return PulsarConfig(
        server.service_url,
        server.admin_url if admin else "",
        token=None if token is None else lambda: token,
    )


async def outcome(config: PulsarConfig, secrets: SecretResolver | None = None) -> str:
    """`` when the topic can be read, else the error's reason and field."""
    source: LogSource = open_source(config, secrets)
    try:
        await source.probe()
        found = await source.log_range(TOPIC)
        reader = await source.open(TOPIC, found.first)
        await reader.read(MANY, 0.2)
        await reader.close()
    except UserError as error:
        return f"{error.reason} {error.field}"
    finally:
        await source.close()
    return ""


WRONG = "not-what-it-knows"
TOKEN = "QUEUE_ACCESS_DENIED source.pulsar.token"


@pytest.mark.parametrize("admin", [True, False])
async def test_a_token_right_and_wrong(guarded: PulsarServer, admin: bool) -> None:
    known = security(guarded)
    token = known.token("reader")
    expected = "" if admin else "QUEUE_EMPTY source.pulsar.admin_url"
    assert await outcome(plain(guarded, token, admin=admin)) == expected
    wrong = {
        "signed by another": token[:-4] + "AAAA",
        "expired": known.token("reader", expires_unix_s=int(time.time()) - 60),
        "no token at all": "nonsense",
    }
    for what, bad in wrong.items():
        assert await outcome(plain(guarded, bad, admin=admin)) == TOKEN, what
    assert await outcome(plain(guarded, None, admin=admin)) == TOKEN
    # It is somebody, who may not read.
    assert await outcome(plain(guarded, known.token("nobody"), admin=admin)) == TOKEN


async def test_tls_and_client_certificates_right_and_wrong(guarded: PulsarServer) -> None:
    known = security(guarded)
    token = known.token("reader")
    encrypted = PulsarConfig(
        known.service_url,
        known.admin_url,
        tls=tls_pb2.Tls(ca_file=str(known.ca_file)),
        token=lambda: token,
    )
    assert await outcome(encrypted) == ""
    failed = "QUEUE_TLS_FAILED source.pulsar.tls"
    assert await outcome(replace(encrypted, tls=None)) == failed
    assert await outcome(replace(encrypted, tls=None, admin_url="")) == failed
    nowhere = replace(encrypted, tls=tls_pb2.Tls(ca_file="/nowhere/ca.pem"))
    assert await outcome(nowhere) == "TLS_FILE_UNUSABLE source.pulsar.tls.ca_file"

    def mutual(role: str, authority: str = "ca") -> PulsarConfig:
        certificate, key = known.certificate(role, authority=authority)
        tls = tls_pb2.Tls(
            ca_file=str(known.ca_file), certificate_file=str(certificate), key_file=str(key)
        )
        return replace(encrypted, tls=tls, token=None)

    assert await outcome(mutual("reader")) == ""
    denied = "QUEUE_ACCESS_DENIED source.pulsar.tls"
    assert await outcome(mutual("nobody")) == denied
    assert await outcome(replace(mutual("nobody"), admin_url="")) == denied
    assert await outcome(mutual("reader", "other")) in (failed, denied)
    assert await outcome(replace(mutual("reader", "other"), admin_url="")) in (failed, denied)


async def test_a_new_token_needs_no_restart(guarded: PulsarServer) -> None:
    tokens = ["nonsense"]
    config = replace(plain(guarded, "", admin=True), token=lambda: tokens[0])
    source = open_source(config)
    with pytest.raises(UserError, match="QUEUE_ACCESS_DENIED"):
        await source.probe()
    tokens[0] = security(guarded).token("reader")
    await source.probe()
    await source.log_range(TOPIC)
    await source.close()


@pytest.fixture
def redirector(guarded: PulsarServer) -> Iterator[str]:
    """A broker that owns nothing: it sends everyone on, as one does of several."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", guarded.admin_url + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_the_token_goes_with_a_redirect_to_the_topics_broker(
    guarded: PulsarServer, redirector: str
) -> None:
    config = plain(guarded, security(guarded).token("reader"), admin=True)
    assert await outcome(replace(config, admin_url=redirector)) == ""
    nobody = plain(guarded, security(guarded).token("nobody"), admin=True)
    assert await outcome(replace(nobody, admin_url=redirector)) == TOKEN


# ---- OAuth 2.0


@pytest.fixture
def provider(guarded: PulsarServer) -> Iterator[Provider]:
    """Its tokens are those of `reader`."""
    with openid_provider(lambda seconds: lasting(guarded, "reader", seconds)) as provider:
        yield provider


def lasting(server: PulsarServer, role: str, seconds: int) -> str:
    return security(server).token(role, expires_unix_s=int(time.time()) + seconds)


def by_provider(
    server: PulsarServer, provider: Provider, *, admin: bool = True, **oauth: str
) -> PulsarConfig:
    client = task_pb2.PulsarOauth(
        issuer_url=provider.url,
        client_id="alice-client",
        client_secret=secret_pb2.Secret(env="TEST_SECRET"),
    )
    for name, value in oauth.items():
        setattr(client, name, value)
    return replace(plain(server, None, admin=admin), oauth=client)


def knowing(secret: str) -> SecretResolver:
    return SecretResolver(env_prefix="TEST_", environ={"TEST_SECRET": secret})


@pytest.mark.parametrize("method", ["client_secret_post", "client_secret_basic"])
async def test_a_providers_token_serves_the_broker_and_its_rest_api(
    guarded: PulsarServer, provider: Provider, method: str
) -> None:
    provider.methods, provider.secret = (method,), "right: with %, + and more"
    config = by_provider(guarded, provider, audience="urn:pulsar", scope="read")
    assert await outcome(config, knowing(provider.secret)) == ""
    assert [(form["audience"], form["scope"]) for form in provider.asked] == [
        ("urn:pulsar", "read")
    ]
    without = by_provider(guarded, provider, admin=False)
    expected = "QUEUE_EMPTY source.pulsar.admin_url"
    assert await outcome(without, knowing(provider.secret)) == expected


@pytest.mark.parametrize("admin", [True, False])
async def test_what_a_provider_refuses_is_named_and_asked_once(
    guarded: PulsarServer, provider: Provider, admin: bool
) -> None:
    source = open_source(by_provider(guarded, provider, admin=admin), knowing(WRONG))
    for ask in (source.probe(), source.log_range(TOPIC), source.probe(), source.log_range(TOPIC)):
        with pytest.raises(UserError, match=r"QUEUE_ACCESS_DENIED.*invalid_client") as refused:
            await ask
        assert refused.value.field == "source.pulsar.oauth.client_secret"
        assert WRONG not in refused.value.message
    await asyncio.sleep(2)
    await source.close()
    assert len(provider.asked) == 1, "a storm"
    scope = by_provider(guarded, provider, admin=admin, scope="unheard")
    denied = "QUEUE_ACCESS_DENIED source.pulsar.oauth"
    assert await outcome(scope, knowing("right")) == f"{denied}.scope"
    elsewhere = by_provider(guarded, provider, admin=admin, issuer_url=f"{provider.url}/else")
    assert await outcome(elsewhere, knowing("right")) == f"{denied}.issuer_url"
    missing = "SECRET_MISSING source.pulsar.oauth.client_secret"
    assert await outcome(by_provider(guarded, provider, admin=admin), knowing("")) == missing
    # A token it is, of somebody who may not read.
    provider.make = lambda seconds: lasting(guarded, "nobody", seconds)
    assert await outcome(by_provider(guarded, provider, admin=admin), knowing("right")) == denied
    provider.broken = 503
    with pytest.raises(RetryableError, match=r"QUEUE_UNREACHABLE: the identity provider.* 503"):
        await outcome(by_provider(guarded, provider, admin=admin), knowing("right"))


async def test_a_provider_is_reached_by_tls_with_its_own_authority(
    guarded: PulsarServer, tmp_path: Path
) -> None:
    authority, other = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    pair = authority.issue("provider", "127.0.0.1")
    with openid_provider(lambda seconds: lasting(guarded, "reader", seconds), pair) as provider:

        def trusting(ca_file: str) -> PulsarConfig:
            return by_provider(guarded, provider, ca_file=ca_file)

        right = trusting(str(authority.ca_file))
        assert await outcome(right, knowing("right")) == ""
        field = "source.pulsar.oauth.ca_file"
        for wrong in (str(other.ca_file), ""):
            assert await outcome(trusting(wrong), knowing("right")) == f"QUEUE_TLS_FAILED {field}"
        nowhere = trusting("/nowhere/ca.pem")
        assert await outcome(nowhere, knowing("right")) == f"TLS_FILE_UNUSABLE {field}"
        provider.token_url = provider.token_url.replace("https:", "http:")
        expected = "QUEUE_ACCESS_DENIED source.pulsar.oauth.issuer_url"
        assert await outcome(right, knowing("right")) == expected


async def test_reading_outlasts_tokens_and_ends_with_a_changed_secret(
    guarded: PulsarServer, provider: Provider, tmp_path: Path
) -> None:
    provider.seconds = 4
    kept = tmp_path / "secret"
    kept.write_text(provider.secret)
    config = by_provider(guarded, provider)
    assert config.oauth is not None
    config.oauth.client_secret.file = str(kept)
    secrets = SecretResolver(env_prefix="-", folders=[str(tmp_path)])
    topic = "by-dev-rootcoord-dml_outlasting"
    guarded.admin("PUT", f"persistent/public/default/{topic}")
    source = open_source(config, secrets)
    reader = await source.open(topic, (await source.log_range(topic)).first)
    client = pulsar.Client(
        guarded.service_url,
        authentication=pulsar.AuthenticationToken(security(guarded).token("admin")),
        logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, "/dev/null"),
    )
    try:
        producer = client.create_producer(f"persistent://public/default/{topic}")
        sent: list[bytes] = []
        got: list[bytes] = []
        async with asyncio.timeout(60):
            # The old secret until the second token, a new one from then on.
            while len(provider.asked) < 4:
                if len(provider.asked) == 2 and provider.secret == "right":
                    provider.secret = "another"
                    kept.write_text("another")
                sent.append(b"%d" % len(sent))
                await asyncio.to_thread(producer.send, sent[-1])
                got += payloads(await read_all(reader, 1))
        assert got == sent
        provider.secret = "unknown"
        with pytest.raises(UserError, match="invalid_client") as refused:
            await read_all(reader, 1)
        assert refused.value.field == "source.pulsar.oauth.client_secret"
        asked = len(provider.asked)
        await asyncio.sleep(3)
        assert len(provider.asked) <= asked + 1, "a storm"
    finally:
        await asyncio.to_thread(client.close)
        await reader.close()
        await source.close()
