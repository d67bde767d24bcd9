"""Logins and TLS of a source's Kafka, right and wrong, on a real broker with recorded messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import KafkaConfig, LogSource, kafka
from milvus_cdc.source.registry import open_source
from milvus_cdc_replicator.reader import PchannelHub, Subscription
from milvuscdc.v1 import secret_pb2, sink_kafka_pb2
from structlog.testing import capture_logs

from tests.contract.identity_provider import identity_provider
from tests.contract.recorded import RECORDED, TOPIC, read_back
from tests.servers import KafkaServer
from tests.servers.kafka_security import PASSWORD, KafkaSecurity
from tests.servers.nats import certificates

pytestmark = pytest.mark.kafka

PLAIN = sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN
SCRAM_256 = sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_256
SCRAM_512 = sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_512
SECURITY = "source.kafka.security"


@pytest.fixture(autouse=True)
def no_secret_is_told() -> Iterator[None]:
    with capture_logs() as logs:
        yield
    assert PASSWORD not in repr(logs)


@pytest.fixture(scope="module")
def broker(kafka_broker: KafkaServer) -> KafkaServer:
    """alice, and who shows the client's certificate, may do what docs/security-queues.md lists."""
    settings = {"bootstrap.servers": kafka_broker.brokers}
    admin = AdminClient(settings)
    admin.create_topics([NewTopic(TOPIC, 1, 1)])[TOPIC].result(30)
    rights = (AclOperation.READ, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS)
    bindings = [
        AclBinding(
            ResourceType.TOPIC,
            TOPIC,
            ResourcePatternType.LITERAL,
            user,
            "*",
            right,
            AclPermissionType.ALLOW,
        )
        for user in ("User:alice", "User:CN=client")
        for right in rights
    ]
    for future in admin.create_acls(bindings).values():
        future.result(10)
    # As Milvus' producer does.
    producer = Producer(settings | {"compression.codec": "zstd"})
    for payload in RECORDED:
        producer.produce(TOPIC, payload, partition=0)
    assert producer.flush(30) == 0
    return kafka_broker


@pytest.fixture
def secured(broker: KafkaServer) -> KafkaSecurity:
    assert broker.security is not None
    return broker.security


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of an authority that nobody trusts."""
    folder = tmp_path_factory.mktemp("foreign")
    certificates(folder)
    return folder


def login(mechanism: int, user: str = "alice") -> sink_kafka_pb2.KafkaSasl:
    return sink_kafka_pb2.KafkaSasl(
        mechanism=mechanism,  # type: ignore[arg-type]
        username=user,
        password=secret_pb2.Secret(env="TEST_SECRET"),
    )


def source_of(
    brokers: str, secret: str = "", folder: Path | None = None, **security: object
) -> LogSource:
    folders = [str(folder)] if folder else []
    return open_source(
        KafkaConfig(
            (brokers,),
            sink_kafka_pb2.KafkaSecurity(**security) if security else None,  # type: ignore[arg-type]
        ),
        SecretResolver(env_prefix="TEST_", folders=folders, environ={"TEST_SECRET": secret}),
    )


async def reads(source: LogSource) -> None:
    await read_back(source)
    await source.close()


async def refused(source: LogSource, field: str) -> None:
    with pytest.raises(UserError) as failed:
        await source.probe()
    await source.close()
    error = failed.value
    assert (error.reason, error.field) == ("QUEUE_AUTHENTICATION_FAILED", f"{SECURITY}.{field}")
    assert PASSWORD not in str(error)


@pytest.mark.parametrize("mechanism", [PLAIN, SCRAM_256, SCRAM_512])
async def test_username_and_password(secured: KafkaSecurity, mechanism: int) -> None:
    await reads(source_of(secured.sasl, PASSWORD, sasl=login(mechanism)))
    await refused(source_of(secured.sasl, "wrong", sasl=login(mechanism)), "sasl")


async def test_login_over_tls(secured: KafkaSecurity) -> None:
    tls = sink_kafka_pb2.KafkaTls(ca_file=str(secured.ca_file))
    await reads(source_of(secured.sasl_tls, PASSWORD, sasl=login(PLAIN), tls=tls))
    await refused(source_of(secured.sasl_tls, "wrong", sasl=login(PLAIN), tls=tls), "sasl")
    await refused(
        source_of(secured.sasl_tls, PASSWORD, sasl=login(SCRAM_256), tls=tls), "sasl.mechanism"
    )


async def test_login_by_token(secured: KafkaSecurity) -> None:
    with identity_provider() as token_url:
        sasl = sink_kafka_pb2.KafkaSasl(
            mechanism=sink_kafka_pb2.KAFKA_SASL_MECHANISM_OAUTHBEARER,
            oauth=sink_kafka_pb2.KafkaOauth(
                token_url=token_url,
                client_id="alice-client",
                client_secret=secret_pb2.Secret(env="TEST_SECRET"),
            ),
        )
        await reads(source_of(secured.sasl, "right", sasl=sasl))
        await refused(source_of(secured.sasl, "wrong", sasl=sasl), "sasl.oauth")


async def test_tls(secured: KafkaSecurity, foreign: Path) -> None:
    def tls(ca_file: Path) -> sink_kafka_pb2.KafkaTls:
        return sink_kafka_pb2.KafkaTls(ca_file=str(ca_file))

    await reads(source_of(secured.tls, tls=tls(secured.ca_file)))
    await refused(source_of(secured.tls, tls=tls(foreign / "ca.pem")), "tls.ca_file")
    await refused(source_of(secured.tls, tls=sink_kafka_pb2.KafkaTls()), "tls.ca_file")
    missing = source_of(secured.tls, tls=tls(foreign / "missing.pem"))
    with pytest.raises(UserError) as failed:
        await missing.probe()
    assert failed.value.field == f"{SECURITY}.tls.ca_file"


async def test_mutual_tls(secured: KafkaSecurity, foreign: Path) -> None:
    def tls(certificate: Path | None, key: Path | None) -> sink_kafka_pb2.KafkaTls:
        return sink_kafka_pb2.KafkaTls(
            ca_file=str(secured.ca_file),
            certificate_file=str(certificate or ""),
            key_file=str(key or ""),
        )

    own = tls(secured.certificate_file, secured.key_file)
    await reads(source_of(secured.mutual_tls, tls=own))
    theirs = tls(foreign / "client.pem", foreign / "client-key.pem")
    for wrong in (tls(None, None), theirs):
        await refused(source_of(secured.mutual_tls, tls=wrong), "tls.certificate_file")


async def test_rights_that_are_missing(secured: KafkaSecurity) -> None:
    bob = source_of(secured.sasl, PASSWORD, sasl=login(PLAIN, "bob"))
    await bob.probe()
    with pytest.raises(UserError) as failed:
        await bob.log_range(TOPIC)
    assert failed.value.reason == "QUEUE_ACCESS_DENIED"
    await bob.close()


async def test_without_a_login_where_one_is_wanted(
    secured: KafkaSecurity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker just ends such a connection, as one that is starting, or a proxy, may do."""
    monkeypatch.setattr(kafka, "REQUEST_SECONDS", 2.0)
    for listener in (secured.sasl, secured.tls):
        nobody = source_of(listener)
        with pytest.raises(RetryableError, match="does this listener want"):
            await nobody.probe()
        await nobody.close()


async def test_a_proxy_without_a_broker_behind_it_is_no_refusal(
    secured: KafkaSecurity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "REQUEST_SECONDS", 3.0)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    proxy = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    tls = sink_kafka_pb2.KafkaTls(ca_file=str(secured.ca_file))
    for source in (
        source_of(address, tls=tls),
        source_of(address, PASSWORD, tls=tls, sasl=login(PLAIN)),
    ):
        with pytest.raises(RetryableError, match="QUEUE_UNREACHABLE"):
            await source.probe()
        await source.close()
    proxy.close()


async def test_a_refused_reader_stops_and_a_mended_secret_counts_from_then_on(
    secured: KafkaSecurity, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    sasl = login(PLAIN)
    sasl.password.CopyFrom(secret_pb2.Secret(file=str(file)))
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        host, port = secured.sasl.split(":")
        behind, before = await asyncio.open_connection(host, int(port))

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(
            pass_on(reader, before), pass_on(behind, writer), return_exceptions=True
        )

    proxy = await asyncio.start_server(count, "127.0.0.1", 0)
    address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    source = source_of(address, folder=tmp_path, sasl=sasl)
    first = (await source.log_range(TOPIC)).first
    # The source's own client is logged in; the reader's is made now.
    file.write_text("wrong")
    hub, errors = PchannelHub(source, TOPIC), list[CdcError | None]()

    def subscribe() -> None:
        hub.subscribe(
            Subscription(
                TOPIC,
                "",
                0,
                first,
                -1,
                deliver=lambda _vchannel, _items: None,
                has_room=lambda: True,
                on_error=errors.append,
            )
        )

    subscribe()
    async with asyncio.timeout(60):
        while not any(isinstance(error, UserError) for error in errors):
            await asyncio.sleep(0.05)
    last = errors[-1]
    assert isinstance(last, UserError)
    assert (last.reason, last.field) == ("QUEUE_AUTHENTICATION_FAILED", f"{SECURITY}.sasl")
    await asyncio.sleep(1.0)  # the reader is closed behind its error
    stopped = connections
    await asyncio.sleep(2.0)
    assert connections == stopped
    file.write_text(PASSWORD)
    subscribe()
    async with asyncio.timeout(60):
        while hub.end_order < len(RECORDED) - 1:
            await asyncio.sleep(0.05)
    await hub.close()
    await source.close()
    proxy.close()


async def test_a_refused_question_is_asked_anew_with_what_changed(
    secured: KafkaSecurity, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("wrong")
    sasl = login(SCRAM_256)
    sasl.password.CopyFrom(secret_pb2.Secret(file=str(file)))
    source = source_of(secured.sasl, folder=tmp_path, sasl=sasl)
    with pytest.raises(UserError, match="QUEUE_AUTHENTICATION_FAILED"):
        await source.probe()
    file.write_text(PASSWORD)
    await reads(source)
