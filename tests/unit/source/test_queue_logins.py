"""What a task may say of its source's queue; nothing here connects to anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from confluent_kafka import KafkaError
from milvus_cdc.cli.task_file import parse_task
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import KafkaConfig, NatsConfig
from milvus_cdc.source.kafka_client import Access
from milvus_cdc.source.nats_login import login
from milvus_cdc.source.registry import open_source
from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.validation import check
from milvus_cdc_replicator.spec import queue_config
from milvuscdc.v1 import secret_pb2, sink_kafka_pb2, task_pb2, tls_pb2

ROOT = Path(__file__).parents[3]
SECRET = secret_pb2.Secret(env="TEST_SECRET")
SECRETS = SecretResolver(env_prefix="TEST_", environ={"TEST_SECRET": "hidden"})
URL = "nats://127.0.0.1:1"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (NatsConfig("nats://me:hidden@127.0.0.1:1"), "url"),
        (NatsConfig(URL, username="me"), "password"),
        (NatsConfig(URL, password=SECRET), "username"),
        (NatsConfig(URL, token=SECRET, username="me", password=SECRET), "username"),
        (NatsConfig(URL, token=SECRET, nkey_seed=SECRET), "nkey_seed"),
        (NatsConfig(URL, token=SECRET, credentials_file="/a"), "credentials_file"),
        (NatsConfig(URL, nkey_seed=SECRET), "nkey_seed"),
        (NatsConfig(URL, token=secret_pb2.Secret(env="TEST_NOT")), "token"),
        (NatsConfig(URL, tls=tls_pb2.Tls(key_file="/a")), "tls.certificate_file"),
        (NatsConfig(URL, tls=tls_pb2.Tls(certificate_file="/a")), "tls.key_file"),
        (NatsConfig(URL, tls=tls_pb2.Tls(ca_file="/nowhere")), "tls.ca_file"),
        (NatsConfig(URL, tls_handshake_first=True), "tls_handshake_first"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(config: NatsConfig, field: str) -> None:
    with pytest.raises(UserError) as failed:
        login(config, SECRETS)
    assert failed.value.field == f"source.nats.{field}"
    assert f"source.nats.{field}" in failed.value.message
    assert "hidden" not in str(failed.value)


def test_the_api_refuses_a_login_in_the_address() -> None:
    check(task_pb2.NatsQueue(url="nats://queue:4222"))
    with pytest.raises(ApiError, match="use username and password") as failed:
        check(task_pb2.NatsQueue(url="nats://me:hidden@queue:4222"))
    assert "hidden" not in str(failed.value)


def test_a_handshake_first_needs_tls_and_reaches_the_replicator() -> None:
    queue = task_pb2.NatsQueue(url="nats://queue:4222", tls_handshake_first=True)
    with pytest.raises(ApiError, match="tlsHandshakeFirst: is of no use without tls"):
        check(queue)
    queue.tls.ca_file = "/ca.pem"
    check(queue)
    config = queue_config(task_pb2.Source(nats=queue))
    assert isinstance(config, NatsConfig)
    assert config.tls_handshake_first


async def test_secrets_that_nobody_allowed_are_refused() -> None:
    security = sink_kafka_pb2.KafkaSecurity(
        sasl=sink_kafka_pb2.KafkaSasl(
            mechanism=sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN, username="me", password=SECRET
        )
    )
    for config in (NatsConfig(URL, token=SECRET), KafkaConfig(("127.0.0.1:1",), security)):
        with pytest.raises(UserError, match="SECRET_NOT_ALLOWED"):
            await open_source(config).probe()


def test_only_the_refusal_of_what_is_there_now_is_final(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("old")
    security = sink_kafka_pb2.KafkaSecurity(tls=sink_kafka_pb2.KafkaTls(ca_file=str(authority)))
    access = Access(KafkaConfig(("127.0.0.1:1",), security), SECRETS)
    terms = access.terms()
    refusal = KafkaError(KafkaError._SSL, "certificate verify failed")
    final = access.refused(terms, refusal)
    assert isinstance(final, UserError)
    assert final.field == "source.kafka.security.tls.ca_file"
    authority.write_text("new")
    assert isinstance(access.refused(terms, refusal), RetryableError)


@pytest.mark.parametrize(
    ("code", "text", "times", "refused"),
    [
        (KafkaError._AUTHENTICATION, "Invalid username or password", 1, False),
        (KafkaError._AUTHENTICATION, "Invalid username or password", 2, True),
        (KafkaError._AUTHENTICATION, "Failed to acquire token: invalid_client", 1, True),
        (KafkaError._AUTHENTICATION, "Failed to acquire token: HTTP error 503", 1, False),
        (KafkaError._TRANSPORT, "ssl/tls alert bad certificate: SSL alert number 42", 2, True),
        (KafkaError._SSL, "SSL handshake failed: Disconnected: connection reset", 2, False),
    ],
)
def test_a_refusal_is_told_from_a_broker_that_is_away(
    code: int, text: str, times: int, refused: bool
) -> None:
    fault = LastFault()
    for _ in range(times):
        fault(KafkaError(code, text))
    assert (fault.refusal(0.0) is not None) is refused


def test_tasks_with_other_logins_have_sources_of_their_own() -> None:
    def source(name: str) -> task_pb2.Source:
        nats = task_pb2.NatsQueue(url=URL, username=name, password=SECRET)
        return task_pb2.Source(nats=nats)

    same = {queue_config(source(name)): name for name in ("me", "me", "you")}
    assert len(same) == 2


def test_the_example_is_a_task() -> None:
    for file in ("examples/task-secured-queue.yaml", "deploy/examples/secure/task.yaml"):
        check(parse_task((ROOT / file).read_text()))
