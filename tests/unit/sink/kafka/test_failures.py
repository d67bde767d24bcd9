"""Which class an error of the Kafka client has."""

from __future__ import annotations

import time

import pytest
from confluent_kafka import KafkaError
from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.sink.kafka.failures import RecordTooLargeError, translate


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (KafkaError._MSG_TIMED_OUT, UnknownOutcomeError, "SINK_TIMEOUT"),
        (KafkaError._PURGE_INFLIGHT, UnknownOutcomeError, "SINK_TIMEOUT"),
        (KafkaError._PURGE_QUEUE, UnknownOutcomeError, "SINK_TIMEOUT"),
        (KafkaError.NOT_ENOUGH_REPLICAS, RetryableError, "SINK_ERROR"),
        (KafkaError._FATAL, RetryableError, "SINK_ERROR"),
        (KafkaError.MSG_SIZE_TOO_LARGE, RecordTooLargeError, "RECORD_TOO_LARGE"),
        (KafkaError._AUTHENTICATION, UserError, "SINK_AUTHENTICATION_FAILED"),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, UserError, "SINK_ACCESS_DENIED"),
        (KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, UserError, "SINK_ACCESS_DENIED"),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, UserError, "SINK_TOPIC_MISSING"),
        (KafkaError.INVALID_REPLICATION_FACTOR, UserError, "SINK_TOPIC_REFUSED"),
        (KafkaError.TOPIC_EXCEPTION, UserError, "SINK_RECORD_REFUSED"),
    ],
)
def test_classes(code: int, kind: type[CdcError], reason: str) -> None:
    error = translate(KafkaError(code), "b:1", "writing to topic t")
    assert type(error) is kind
    assert error.reason == reason
    assert "b:1: writing to topic t" in error.message
    assert error.field.startswith("sink.kafka") is issubclass(kind, UserError)


def test_a_refused_login_is_behind_a_timeout_only_if_it_is_refused_again() -> None:
    fault, timeout = LastFault(), KafkaError(KafkaError._MSG_TIMED_OUT)
    refusal = KafkaError(KafkaError._AUTHENTICATION, "wrong password")
    started = time.monotonic()

    def meaning() -> CdcError:
        return translate(timeout, "b:1", "writing", fault.since(started))

    assert fault.since(started) is None
    fault(refusal)
    assert isinstance(meaning(), UnknownOutcomeError)
    assert "wrong password" in meaning().message
    fault(KafkaError(KafkaError._TRANSPORT, "refused"))
    fault(refusal)
    assert isinstance(meaning(), UnknownOutcomeError)
    fault(refusal)
    fault(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    assert meaning().reason == "SINK_AUTHENTICATION_FAILED"
    # What was before does not count.
    started = time.monotonic()
    assert isinstance(meaning(), UnknownOutcomeError)
