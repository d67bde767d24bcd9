"""What a task may say of its Kafka sink; nothing here connects to anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import duration_pb2
from milvus_cdc.errors import UserError
from milvus_cdc.kafka_security import Settings
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import KafkaWriter, settings
from milvuscdc.v1 import secret_pb2, sink_kafka_pb2

PLAIN = sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN
BEARER = sink_kafka_pb2.KAFKA_SASL_MECHANISM_OAUTHBEARER
SECRET = secret_pb2.Secret(env="TEST_SECRET")
OAUTH = sink_kafka_pb2.KafkaOauth(
    token_url="http://127.0.0.1:9/token", client_id="me", client_secret=SECRET, scope="kafka"
)


def made(**options: object) -> tuple[KafkaWriter, Settings]:
    spec = sink_kafka_pb2.KafkaSink(brokers=["127.0.0.1:9"], **options)  # type: ignore[arg-type]
    secrets = SecretResolver(env_prefix="TEST_", environ={"TEST_SECRET": "hidden"})
    writer = KafkaWriter(spec, secrets)
    return writer, settings.producer(spec, settings.connection(spec, secrets))


def refused(**options: object) -> tuple[str, str]:
    with pytest.raises(UserError) as failed:
        made(**options)
    assert "hidden" not in failed.value.message
    return failed.value.field, failed.value.message


def sasl(**options: object) -> sink_kafka_pb2.KafkaSecurity:
    return sink_kafka_pb2.KafkaSecurity(
        sasl=sink_kafka_pb2.KafkaSasl(**options)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "name",
    [
        "acks",
        "request.required.acks",
        "enable.idempotence",
        "transactional.id",
        "partitioner",
        "bootstrap.servers",
        "metadata.broker.list",
        "message.timeout.ms",
        "delivery.timeout.ms",
        "compression.type",
        "security.protocol",
        "sasl.mechanisms",
        "sasl.password",
        "sasl.oauthbearer.config",
        "ssl.ca.location",
        "ssl.keystore.password",
        "plugin.library.paths",
        "allow.auto.create.topics",
        "error_cb",
        "oauth_cb",
    ],
)
def test_what_the_sink_owns_is_refused_by_name(name: str) -> None:
    field, message = refused(librdkafka={name: "1", "linger.ms": "9"})
    assert field == f"sink.kafka.librdkafka.{name}"
    assert "cannot be set" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linger", "5"),  # not there
        ("linger.ms", "soon"),  # no number
        ("message.max.bytes", "1"),  # out of range
        ("max.in.flight", "10"),  # not with idempotence
        ("fetch.min.bytes", "1"),  # only a consumer heeds it
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    field, message = refused(librdkafka={"batch.size": "100000", name: value})
    assert field == f"sink.kafka.librdkafka.{name}"
    assert message.startswith(field)


def test_any_other_setting_passes_and_what_is_promised_is_set() -> None:
    _, found = made(
        librdkafka={"linger.ms": "50", "queue.buffering.max.kbytes": "1000", "client.id": "me"},
        compression=sink_kafka_pb2.KAFKA_COMPRESSION_ZSTD,
    )
    assert found == {
        "linger.ms": "50",
        "queue.buffering.max.kbytes": "1000",
        "client.id": "me",
        "bootstrap.servers": "127.0.0.1:9",
        "security.protocol": "PLAINTEXT",
        "compression.type": "zstd",
        "acks": "all",
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        "allow.auto.create.topics": False,
    }


def test_logins() -> None:
    _, found = made(security=sasl(mechanism=PLAIN, username="me", password=SECRET))
    assert found["security.protocol"] == "SASL_PLAINTEXT"
    assert found["sasl.mechanism"] == "PLAIN"
    assert (found["sasl.username"], found["sasl.password"]) == ("me", "hidden")
    security = sasl(mechanism=BEARER, oauth=OAUTH)
    security.tls.SetInParent()
    _, found = made(security=security)
    assert found["security.protocol"] == "SASL_SSL"
    assert found["sasl.oauthbearer.client.secret"] == "hidden"
    assert found["sasl.oauthbearer.scope"] == "kafka"


def test_incomplete_security_is_named() -> None:
    for security, field in (
        (sasl(), "sasl.mechanism"),
        (sasl(mechanism=PLAIN, password=SECRET), "sasl.username"),
        (sasl(mechanism=PLAIN, username="me"), "sasl.password"),
        (sasl(mechanism=BEARER), "sasl.oauth"),
        (sasl(mechanism=PLAIN, username="me", password=SECRET, oauth=OAUTH), "sasl.oauth"),
        (sasl(mechanism=BEARER, username="me", oauth=OAUTH), "sasl.username"),
        (
            sasl(mechanism=PLAIN, username="me", password=secret_pb2.Secret(env="TEST_NOT")),
            "sasl.password",
        ),
    ):
        assert refused(security=security)[0] == f"sink.kafka.security.{field}"


def test_certificates(tmp_path: Path) -> None:
    def tls(**files: str) -> sink_kafka_pb2.KafkaSecurity:
        return sink_kafka_pb2.KafkaSecurity(
            tls=sink_kafka_pb2.KafkaTls(**files)  # type: ignore[arg-type]
        )

    made(security=tls())
    missing = str(tmp_path / "missing.pem")
    field, message = refused(security=tls(ca_file=missing))
    assert field == "sink.kafka.security.tls.ca_file"
    assert "ssl.ca.location" in message
    assert refused(security=tls(key_file=missing))[0].endswith("tls.certificate_file")
    assert refused(security=tls(certificate_file=missing))[0].endswith("tls.key_file")


def test_options_that_have_no_meaning() -> None:
    assert refused(heartbeat_interval=duration_pb2.Duration(seconds=5))[0] == (
        "sink.kafka.heartbeat_interval"
    )
    assert refused(transactions=sink_kafka_pb2.KafkaTransactions(producers=3))[0] == (
        "sink.kafka.transactions"
    )


def test_the_library_gives_up_well_before_the_write_does() -> None:
    limits = [settings.message_timeout_ms(seconds) for seconds in (0.1, 1, 3.9, 4, 8, 30)]
    assert limits == [93, 375, 750, 1500, 3000, 6000]


def test_what_each_delivery_promises() -> None:
    assert not made()[0].capabilities.own_checkpoint
    exactly_once = made(delivery=sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE)[0].capabilities
    assert exactly_once.own_checkpoint
    assert exactly_once.in_flight == 1
