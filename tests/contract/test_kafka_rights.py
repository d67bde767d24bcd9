"""The Kafka writer where the broker asks who it is: logins, rights, TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from milvus_cdc.errors import CdcError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import secret_pb2, sink_kafka_pb2

from tests.contract.identity_provider import identity_provider
from tests.contract.kafka_samples import (
    LineFormat,
    batch,
    read_all,
    some_table,
    spec_for,
    upserts,
)
from tests.servers import Authority, KafkaServer
from tests.servers.kafka_security import PASSWORD

pytestmark = pytest.mark.kafka


SECONDS = 8.0


@pytest.fixture
def broker(kafka_broker: KafkaServer) -> KafkaServer:
    return kafka_broker


def secured(
    broker: KafkaServer,
    mechanism: int = sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN,
    user: str = "alice",
    password: str = PASSWORD,
    **options: object,
) -> KafkaWriter:
    assert broker.security is not None
    sasl = sink_kafka_pb2.KafkaSasl(
        mechanism=mechanism,  # type: ignore[arg-type]
        username=user,
        password=secret_pb2.Secret(env="TEST_PASSWORD"),
    )
    security = sink_kafka_pb2.KafkaSecurity(sasl=sasl)
    secrets = SecretResolver(env_prefix="TEST_", environ={"TEST_PASSWORD": password})
    writer = KafkaWriter(spec_for(broker.security.sasl, security=security, **options), secrets)
    writer._format = LineFormat()
    return writer


@pytest.fixture(scope="module")
def granted(kafka_broker: KafkaServer) -> None:
    """alice may do what docs/kafka.md says that the sink needs, on topics named `ours...`."""
    admin = AdminClient({"bootstrap.servers": kafka_broker.brokers})
    rights = [
        (ResourceType.TOPIC, "ours", operation)
        for operation in (
            AclOperation.CREATE,
            AclOperation.DESCRIBE,
            AclOperation.WRITE,
            AclOperation.READ,
        )
    ] + [
        (ResourceType.TRANSACTIONAL_ID, "milvus-cdc/", AclOperation.WRITE),
        (ResourceType.TRANSACTIONAL_ID, "milvus-cdc/", AclOperation.DESCRIBE),
    ]
    bindings = [
        AclBinding(
            kind,
            name,
            ResourcePatternType.PREFIXED,
            "User:alice",
            "*",
            operation,
            AclPermissionType.ALLOW,
        )
        for kind, name, operation in rights
    ]
    for future in admin.create_acls(bindings).values():
        future.result(10)


async def test_logins_and_rights(
    broker: KafkaServer, granted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mechanism in (
        sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN,
        sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_256,
        sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_512,
    ):
        table = some_table()
        sink = secured(
            broker,
            mechanism,
            topic="ours.{collection}",
            delivery=sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE,
            transactions=sink_kafka_pb2.KafkaTransactions(checkpoint_topic="ours-checkpoints"),
        )
        await sink.probe()
        await sink.open(table, Opening.NEW, 1)
        await sink.write(table, batch(upserts(1, (1, "a")), upto=1), SECONDS)
        await sink.close()
        assert len(read_all(broker.brokers, f"ours.{table.collection}")) == 1

    monkeypatch.setattr("milvus_cdc.sink.kafka.broker.REQUEST_SECONDS", 3.0)
    sink = secured(broker, password="wrong")
    with pytest.raises(UserError) as failed:
        await sink.probe()
    assert failed.value.reason == "SINK_AUTHENTICATION_FAILED"
    assert failed.value.field == "sink.kafka.security"
    await sink.close()

    for user, topic in (("alice", "theirs.{collection}"), ("bob", "ours.{collection}")):
        sink = secured(broker, user=user, topic=topic)
        with pytest.raises(UserError) as failed:
            await sink.open(some_table(), Opening.NEW, 1)
        assert failed.value.reason == "SINK_ACCESS_DENIED"
        await sink.close()


async def test_rights_that_are_taken_away(broker: KafkaServer, granted: None) -> None:
    admin = AdminClient({"bootstrap.servers": broker.brokers})
    table = some_table()
    topic = f"ours.{table.collection}"
    sink = secured(broker, topic="ours.{collection}")
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, (1, "a"))), SECONDS)
    denied = AclBinding(
        ResourceType.TOPIC,
        topic,
        ResourcePatternType.LITERAL,
        "User:alice",
        "*",
        AclOperation.WRITE,
        AclPermissionType.DENY,
    )
    for future in admin.create_acls([denied]).values():
        future.result(10)

    async def write_on() -> None:
        for _ in range(50):
            await sink.write(table, batch(upserts(2, (1, "b"))), SECONDS)
            await asyncio.sleep(0.1)

    with pytest.raises(UserError) as failed:
        await write_on()
    assert failed.value.reason == "SINK_ACCESS_DENIED"
    await sink.close()
    constant = secured(broker, topic=topic)
    with pytest.raises(UserError) as failed:
        await constant.probe()
    assert failed.value.reason == "SINK_ACCESS_DENIED"
    await constant.close()


async def test_tls(broker: KafkaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert broker.security is not None
    secrets = SecretResolver(env_prefix="TEST_")
    for ca_file, reason in ((str(broker.security.ca_file), ""), ("", "SINK_AUTHENTICATION_FAILED")):
        security = sink_kafka_pb2.KafkaSecurity(tls=sink_kafka_pb2.KafkaTls(ca_file=ca_file))
        sink = KafkaWriter(spec_for(broker.security.tls, security=security), secrets)
        if reason:
            monkeypatch.setattr("milvus_cdc.sink.kafka.broker.REQUEST_SECONDS", 3.0)
            with pytest.raises(UserError) as failed:
                await sink.probe()
            assert failed.value.reason == reason
        else:
            assert "Kafka cluster" in await sink.probe()
        await sink.close()


@pytest.fixture
def token_url() -> Iterator[str]:
    with identity_provider() as url:
        yield url


async def test_login_by_token(
    broker: KafkaServer, granted: None, token_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert broker.security is not None
    monkeypatch.setattr("milvus_cdc.sink.kafka.broker.REQUEST_SECONDS", 4.0)
    for secret in ("right", "wrong"):
        sasl = sink_kafka_pb2.KafkaSasl(
            mechanism=sink_kafka_pb2.KAFKA_SASL_MECHANISM_OAUTHBEARER,
            oauth=sink_kafka_pb2.KafkaOauth(
                token_url=token_url,
                client_id="alice-client",
                client_secret=secret_pb2.Secret(env="TEST_SECRET"),
            ),
        )
        sink = KafkaWriter(
            spec_for(
                broker.security.sasl,
                security=sink_kafka_pb2.KafkaSecurity(sasl=sasl),
                topic="ours.{collection}",
                delivery=sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE,
                transactions=sink_kafka_pb2.KafkaTransactions(checkpoint_topic="ours-checkpoints"),
            ),
            SecretResolver(env_prefix="TEST_", environ={"TEST_SECRET": secret}),
        )
        sink._format = LineFormat()
        if secret == "right":
            table = some_table()
            await sink.open(table, Opening.NEW, 1)
            await sink.write(table, batch(upserts(1, (1, "a")), upto=1), SECONDS)
            assert len(read_all(broker.brokers, f"ours.{table.collection}")) == 1
        else:
            with pytest.raises(CdcError) as failed:
                await sink.probe()
            assert "invalid_client" in failed.value.message
        await sink.close()


async def test_mutual_tls(
    broker: KafkaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc.sink.kafka.broker.REQUEST_SECONDS", 3.0)
    known = broker.security
    assert known is not None
    stranger = Authority(tmp_path, "stranger").issue("client")
    for certificate, key, right in (
        (known.certificate_file, known.key_file, True),
        (stranger.certificate, stranger.key, False),
        ("", "", False),
    ):
        tls = sink_kafka_pb2.KafkaTls(
            ca_file=str(known.ca_file), certificate_file=str(certificate), key_file=str(key)
        )
        security = sink_kafka_pb2.KafkaSecurity(tls=tls)
        spec = spec_for(known.mutual_tls, security=security)
        sink = KafkaWriter(spec, SecretResolver(env_prefix="TEST_"))
        if right:
            assert "Kafka cluster" in await sink.probe()
        else:
            with pytest.raises(UserError) as failed:
                await sink.probe()
            assert failed.value.reason == "SINK_AUTHENTICATION_FAILED"
        await sink.close()
