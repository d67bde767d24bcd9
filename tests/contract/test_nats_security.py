"""Logins and TLS of a source's NATS, right and wrong, on real servers with recorded messages."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import LogSource, NatsConfig, nats_connection
from milvus_cdc.source.registry import open_source
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.jobs import JobRunner
from milvus_cdc_replicator.reader import PchannelHub, Subscription
from milvuscdc.v1 import replication_service_pb2, secret_pb2, task_pb2, tls_pb2
from structlog.testing import capture_logs

from tests.contract.recorded import RECORDED, TOPIC, read_back
from tests.servers import Authority
from tests.servers.nats import PASSWORD, USERS, NatsOperator, NatsServer, certificates, user_key
from tests.servers.tls_front import TlsFront

SECRET = secret_pb2.Secret(env="TEST_SECRET")


@pytest.fixture(autouse=True)
def quick_goodbyes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a handshake that failed, the client waits for an end that does not come."""
    monkeypatch.setattr(nats_connection, "CLOSE_SECONDS", 0.2)


@pytest.fixture(autouse=True)
def no_secret_is_told() -> Iterator[None]:
    with capture_logs() as logs:
        yield
    assert PASSWORD not in repr(logs)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    certificates(folder)
    certificates(folder / "foreign")
    return folder


@contextlib.asynccontextmanager
async def recorded(folder: Path, options: str, **writer: Any) -> AsyncIterator[NatsServer]:
    """A server with a stream as Milvus makes it; `writer` is how its writer connects."""
    with NatsServer(folder, options, tls_first="tls_handshake_first" in writer) as server:
        client = await nats.connect(server.url, **writer)
        stream = client.jetstream()
        await stream.add_stream(name=TOPIC, subjects=[TOPIC], max_age=259_200)
        for payload in RECORDED:
            await stream.publish(TOPIC, payload)
        await client.close()
        yield server


def source_of(config: NatsConfig, secret: str = "", folder: Path | None = None) -> LogSource:
    folders = [str(folder)] if folder else []
    return open_source(
        config, SecretResolver(env_prefix="TEST_", folders=folders, environ={"TEST_SECRET": secret})
    )


async def refused(source: LogSource) -> UserError:
    with pytest.raises(UserError) as failed:
        await source.probe()
    await source.close()
    assert PASSWORD not in str(failed.value)
    return failed.value


async def reads(source: LogSource) -> None:
    await read_back(source)
    await source.close()


async def test_username_and_password(tmp_path: Path) -> None:
    async with recorded(tmp_path, USERS, user="alice", password=PASSWORD) as server:
        alice = NatsConfig(server.url, username="alice", password=SECRET)
        await reads(source_of(alice, PASSWORD))
        wrong = await refused(source_of(alice, "wrong"))
        assert (wrong.reason, wrong.field) == (
            "QUEUE_AUTHENTICATION_FAILED",
            "source.nats.password",
        )
        nobody = await refused(source_of(NatsConfig(server.url)))
        assert (nobody.reason, nobody.field) == ("QUEUE_AUTHENTICATION_FAILED", "source.nats")
        assert "set username and password" in nobody.message
        carol = await refused(
            source_of(NatsConfig(server.url, username="carol", password=SECRET), PASSWORD)
        )
        assert carol.reason == "QUEUE_ACCESS_DENIED"
        assert "account that Milvus uses" in carol.message


async def test_rights_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_connection, "API_SECONDS", 1.0)
    async with recorded(tmp_path, USERS, user="alice", password=PASSWORD) as server:
        dave = NatsConfig(server.url, username="dave", password=SECRET)
        await reads(source_of(dave, PASSWORD))
        bob = source_of(NatsConfig(server.url, username="bob", password=SECRET), PASSWORD)
        await bob.probe()
        with pytest.raises(UserError, match=r"stream\.info") as failed:
            await bob.log_range(TOPIC)
        assert failed.value.reason == "QUEUE_ACCESS_DENIED"
        await bob.close()


async def test_token(tmp_path: Path) -> None:
    options = f'authorization {{token: "{PASSWORD}"}}'
    async with recorded(tmp_path, options, token=PASSWORD) as server:
        config = NatsConfig(server.url, token=SECRET)
        await reads(source_of(config, PASSWORD))
        assert (await refused(source_of(config, "wrong"))).field == "source.nats.token"


async def test_nkey(tmp_path: Path) -> None:
    seed, public = user_key()
    options = f"authorization {{users: [{{nkey: {public}}}]}}"
    async with recorded(tmp_path, options, nkeys_seed_str=seed) as server:
        config = NatsConfig(server.url, nkey_seed=SECRET)
        await reads(source_of(config, seed))
        for wrong, reason in (
            (user_key()[0], "QUEUE_AUTHENTICATION_FAILED"),
            ("SUNOSEED", "INVALID_FIELD"),
        ):
            error = await refused(source_of(config, wrong))
            assert (error.reason, error.field) == (reason, "source.nats.nkey_seed")
            assert wrong not in str(error)


async def test_credentials_file(tmp_path: Path) -> None:
    operator = NatsOperator()
    file = tmp_path / "user.creds"
    file.write_text(operator.credentials())
    async with recorded(tmp_path / "nats", operator.options, user_credentials=str(file)) as server:
        config = NatsConfig(server.url, credentials_file=str(file))
        source = source_of(config, folder=tmp_path)
        await reads(source)
        for content, reason in (
            (operator.credentials(expires=1_700_000_001), "QUEUE_AUTHENTICATION_FAILED"),
            (NatsOperator().credentials(), "QUEUE_AUTHENTICATION_FAILED"),
            ("no credentials at all", "INVALID_FIELD"),
        ):
            file.write_text(content)
            error = await refused(source)
            assert (error.reason, error.field) == (reason, "source.nats.credentials_file")
        file.write_text(operator.credentials())
        await reads(source)
        elsewhere = await refused(source_of(config, folder=tmp_path / "nats"))
        assert elsewhere.reason == "SECRET_NOT_ALLOWED"


async def test_credentials_that_expire_while_reading(tmp_path: Path) -> None:
    operator = NatsOperator()
    file = tmp_path / "user.creds"
    file.write_text(operator.credentials())
    async with recorded(tmp_path / "nats", operator.options, user_credentials=str(file)) as server:
        source = source_of(NatsConfig(server.url, credentials_file=str(file)), folder=tmp_path)
        file.write_text(operator.credentials(expires=int(time.time()) + 5))
        reader = await source.open(TOPIC, (await source.log_range(TOPIC)).first)
        payloads: list[bytes] = []
        while not payloads:
            payloads += [entry.payload for entry in await reader.read(1, 1.0)]
        file.write_text(operator.credentials())
        broke = False
        async with asyncio.timeout(60):
            while not broke or len(payloads) < len(RECORDED):
                try:
                    payloads += [entry.payload for entry in await reader.read(1, 1.0)]
                except RetryableError:
                    broke = True
        assert payloads == RECORDED
        await reader.close()
        await source.close()

        file.write_text(operator.credentials(expires=int(time.time()) + 3))

        async def read_on() -> None:
            reader = await source.open(TOPIC, (await source.log_range(TOPIC)).end)
            try:
                while True:
                    with contextlib.suppress(RetryableError):
                        await reader.read(1, 1.0)
            finally:
                await reader.close()

        with pytest.raises(UserError) as failed:
            async with asyncio.timeout(60):
                await read_on()
        assert failed.value.field == "source.nats.credentials_file"
        await source.close()


async def test_tls(tmp_path: Path, keys: Path) -> None:
    files = f'cert_file: "{keys}/server.pem", key_file: "{keys}/server-key.pem"'
    ca_file = str(keys / "ca.pem")
    trusting = ssl.create_default_context(cafile=ca_file)
    for options in (f"tls {{{files}}}", f"tls {{{files}}}\nallow_non_tls: true"):
        async with recorded(tmp_path / str(len(options)), options, tls=trusting) as server:
            for server_name in ("", "queue.test"):
                tls = tls_pb2.Tls(ca_file=ca_file, server_name=server_name)
                await reads(source_of(NatsConfig(server.url, tls=tls)))
            for wrong, field in (
                (tls_pb2.Tls(ca_file=str(keys / "foreign/ca.pem")), "ca_file"),
                (tls_pb2.Tls(), "ca_file"),
                (tls_pb2.Tls(ca_file=str(keys / "missing.pem")), "ca_file"),
                (tls_pb2.Tls(ca_file=ca_file, server_name="other.test"), "server_name"),
            ):
                error = await refused(source_of(NatsConfig(server.url, tls=wrong)))
                assert error.field == f"source.nats.tls.{field}"


async def test_a_login_is_never_sent_in_clear_where_tls_is_wanted(
    tmp_path: Path, keys: Path
) -> None:
    """By whoever stands in between and takes the offer of TLS out of the server's first words."""
    said: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","auth_required":true,"max_payload":1048576}\r\n')
        said.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = NatsConfig(
        f"nats://127.0.0.1:{port}",
        tls=tls_pb2.Tls(ca_file=str(keys / "ca.pem")),
        username="alice",
        password=SECRET,
    )
    assert (await refused(source_of(config, PASSWORD))).field == "source.nats.tls"
    async with asyncio.timeout(10):
        while not said:
            await asyncio.sleep(0.02)
    assert said == [b""]
    server.close()


async def test_mutual_tls(tmp_path: Path, keys: Path) -> None:
    files = f'cert_file: "{keys}/server.pem", key_file: "{keys}/server-key.pem"'
    ca_file = str(keys / "ca.pem")
    own = ssl.create_default_context(cafile=ca_file)
    own.load_cert_chain(keys / "client.pem", keys / "client-key.pem")

    def config(url: str, folder: Path | None) -> NatsConfig:
        tls = tls_pb2.Tls(ca_file=ca_file)
        if folder:
            tls.certificate_file = str(folder / "client.pem")
            tls.key_file = str(folder / "client-key.pem")
        return NatsConfig(url, tls=tls)

    options = f'tls {{{files}, ca_file: "{ca_file}", verify: true}}'
    async with recorded(tmp_path, options, tls=own) as server:
        await reads(source_of(config(server.url, keys)))
        for folder in (None, keys / "foreign"):
            error = await refused(source_of(config(server.url, folder)))
            assert (error.reason, error.field) == (
                "QUEUE_AUTHENTICATION_FAILED",
                "source.nats.tls.certificate_file",
            )


@contextlib.asynccontextmanager
async def handshake_first(
    folder: Path, authority: Authority, how: str
) -> AsyncIterator[tuple[str, NatsServer]]:
    """The address, and the server behind it."""
    if how == "side-car":
        async with recorded(folder, "") as server:
            with TlsFront(folder, server.url.removeprefix("nats://"), authority) as front:
                yield f"nats://{front.address}", server
        return
    pair = authority.server()
    options = (
        f'tls {{cert_file: "{pair.certificate}", key_file: "{pair.key}", '
        f'ca_file: "{authority.ca_file}", verify: true, handshake_first: true}}'
    )
    own = ssl.create_default_context(cafile=authority.ca_file)
    own.load_cert_chain(pair.certificate, pair.key)
    async with recorded(folder, options, tls=own, tls_handshake_first=True) as server:
        yield server.url, server


@pytest.mark.parametrize("how", ["nats-server", "side-car"])
async def test_the_handshake_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As a nats-server asks for it, and as a proxy in front of one that has no TLS."""
    monkeypatch.setattr(nats_connection, "CONNECT_SECONDS", 3)
    authority, stranger = (Authority(tmp_path / name, name) for name in ("ours", "theirs"))
    client, other = (each.issue("client") for each in (authority, stranger))
    mutual = tls_pb2.Tls(
        ca_file=str(authority.ca_file),
        certificate_file=str(client.certificate),
        key_file=str(client.key),
    )
    async with handshake_first(tmp_path / "nats", authority, how) as (url, _):
        await reads(source_of(NatsConfig(url, tls=mutual, tls_handshake_first=True)))
        nobody = tls_pb2.Tls(ca_file=mutual.ca_file)
        foreign = tls_pb2.Tls(
            ca_file=mutual.ca_file,
            certificate_file=str(other.certificate),
            key_file=str(other.key),
        )
        distrusting, misnaming = tls_pb2.Tls(), tls_pb2.Tls()
        for wrong in (distrusting, misnaming):
            wrong.CopyFrom(mutual)
        distrusting.ca_file, misnaming.server_name = str(stranger.ca_file), "other.test"
        for tls, field in (
            (nobody, "certificate_file"),
            (foreign, "certificate_file"),
            (distrusting, "ca_file"),
            (misnaming, "server_name"),
        ):
            error = await refused(source_of(NatsConfig(url, tls=tls, tls_handshake_first=True)))
            assert (error.reason, error.field) == (
                "QUEUE_AUTHENTICATION_FAILED",
                f"source.nats.tls.{field}",
            )
        # Both wait for the other's first words: it could be a server that starts, so no refusal.
        waiting = source_of(NatsConfig(url, tls=mutual))
        with pytest.raises(RetryableError, match="tls_handshake_first") as unreached:
            await waiting.probe()
        assert unreached.value.reason == "QUEUE_UNREACHABLE"
        await waiting.close()


async def test_a_handshake_that_nobody_asked_for_is_refused(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_connection, "CONNECT_SECONDS", 1)
    files = f'cert_file: "{keys}/server.pem", key_file: "{keys}/server-key.pem"'
    ca_file = str(keys / "ca.pem")
    trusting = ssl.create_default_context(cafile=ca_file)
    tls = tls_pb2.Tls(ca_file=ca_file)
    async with recorded(tmp_path / "plain", "") as server:
        config = NatsConfig(server.url, tls=tls, tls_handshake_first=True)
        error = await refused(source_of(config))
        assert (error.reason, error.field) == (
            "QUEUE_AUTHENTICATION_FAILED",
            "source.nats.tls_handshake_first",
        )
    async with recorded(tmp_path / "tls", f"tls {{{files}}}", tls=trusting) as server:
        # Its first words may come before the client listens for TLS; then both wait.
        source = source_of(NatsConfig(server.url, tls=tls, tls_handshake_first=True))
        with pytest.raises(CdcError, match="tls_handshake_first"):
            await source.probe()
        await source.close()


async def test_a_password_changed_while_reading_stops_it_without_a_storm(tmp_path: Path) -> None:
    async with recorded(tmp_path, USERS, user="alice", password=PASSWORD) as server:
        config = NatsConfig(server.url, username="alice", password=SECRET)
        source = source_of(config, PASSWORD)
        found = await source.log_range(TOPIC)
        hub, errors = PchannelHub(source, TOPIC), list[CdcError | None]()
        hub.subscribe(
            Subscription(
                TOPIC,
                "",
                0,
                found.first,
                -1,
                deliver=lambda _vchannel, _items: None,
                has_room=lambda: True,
                on_error=errors.append,
            )
        )
        async with asyncio.timeout(30):
            while hub.end_order < source.order(found.end) - 1:
                await asyncio.sleep(0.05)
            server.configure(USERS.replace(PASSWORD, "another one"))
            server.reload()
            while not any(isinstance(error, UserError) for error in errors):
                await asyncio.sleep(0.05)
        last = errors[-1]
        assert isinstance(last, UserError)
        assert (last.reason, last.field) == (
            "QUEUE_AUTHENTICATION_FAILED",
            "source.nats.password",
        )
        refusals = server.refusals()
        assert refusals <= 4
        await asyncio.sleep(1.5)
        assert server.refusals() == refusals
        await hub.close()
        await source.close()


async def test_the_probe_of_a_task_names_the_field(tmp_path: Path) -> None:
    async with recorded(tmp_path / "nats", USERS, user="alice", password=PASSWORD) as server:
        sent: list[replication_service_pb2.ConnectRequest] = []
        for secret in (PASSWORD, "wrong"):
            connections = Connections(
                SecretResolver(env_prefix="TEST_", environ={"TEST_SECRET": secret})
            )
            jobs = JobRunner(connections, sent.append)
            job = replication_service_pb2.ProbeJob()
            job.source.nats.CopyFrom(
                task_pb2.NatsQueue(url=server.url, username="alice", password=SECRET)
            )
            job.sink.files.uri = f"file://{tmp_path}"
            sent.clear()
            jobs.start(replication_service_pb2.JobRequest(job_id="1", probe=job))
            async with asyncio.timeout(30):
                while not sent:
                    await asyncio.sleep(0.02)
            update = sent[0].job_update
            if secret == PASSWORD:
                assert update.WhichOneof("update") == "probe", update
            else:
                assert (update.failed.field, update.failed.transient) == (
                    "source.nats.password",
                    False,
                )
            await jobs.close()
            await connections.close()
