"""What an error of the Kafka client means as one of ours.

Laws: a record that may have been appended is UnknownOutcomeError; a login, a right or a size that
is wrong is UserError with the field to change; the rest is worth another try, visibly.

Codes: librdkafka `rdkafka.h`; those without an underscore are the broker's (Kafka protocol).
"""

from __future__ import annotations

from confluent_kafka import KafkaError

from milvus_cdc.errors import (
    CdcError,
    RetryableError,
    RowRefusedError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.kafka_codes import AUTHENTICATION, NO_RIGHT, NO_TOPIC
from milvus_cdc.sink.kafka.settings import FIELD

DENIED = NO_RIGHT | {KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED}
TOO_LARGE = frozenset((KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE))
FENCED = frozenset(
    (
        KafkaError._FENCED,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
    )
)
_UNKNOWN = frozenset(
    (
        KafkaError._MSG_TIMED_OUT,
        KafkaError._TIMED_OUT,
        KafkaError._PURGE_QUEUE,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    )
)
_REFUSED_TOPIC = frozenset(
    (
        KafkaError.INVALID_PARTITIONS,
        KafkaError.INVALID_REPLICATION_FACTOR,
        KafkaError.INVALID_CONFIG,
        KafkaError.INVALID_REQUEST,
        KafkaError.POLICY_VIOLATION,
    )
)


class RecordTooLargeError(RowRefusedError):
    """`record`: its key and the bytes of key and value, where that is known."""

    def __init__(self, message: str) -> None:
        super().__init__("RECORD_TOO_LARGE", message, field=f"{FIELD}.librdkafka")
        self.record: tuple[bytes, int] | None = None


def translate(
    error: KafkaError, brokers: str, what: str, fault: KafkaError | None = None
) -> CdcError:
    """`what` was attempted, for example "writing to topic a"; `fault`: what was wrong with the
    connection meanwhile.
    """
    code = error.code()
    text = f"Kafka at {brokers}: {what}: {error.str()}"
    if fault is not None and code in _UNKNOWN:
        text = f"{text} ({fault.str()})"
        if fault.code() in AUTHENTICATION:
            code = fault.code()
    if code in AUTHENTICATION:
        return UserError(
            "SINK_AUTHENTICATION_FAILED",
            f"{text}; check {FIELD}.security and what the broker expects",
            field=f"{FIELD}.security",
        )
    if code in DENIED:
        return UserError(
            "SINK_ACCESS_DENIED",
            f"{text}; grant it the right (docs/kafka.md lists them)",
            field=f"{FIELD}.security",
        )
    if code in NO_TOPIC:
        return UserError(
            "SINK_TOPIC_MISSING",
            f"{text}. Make it again to go on from here, or resync to get all rows anew",
            field=f"{FIELD}.topic",
        )
    if code in TOO_LARGE:
        return RecordTooLargeError(
            f"{text}; raise the topic's `max.message.bytes` (`{FIELD}.create_topics.config` for "
            f"new topics) and `{FIELD}.librdkafka: message.max.bytes`, or, where single records "
            f"are small enough, lower `{FIELD}.librdkafka: batch.size`"
        )
    if code in _REFUSED_TOPIC:
        return UserError("SINK_TOPIC_REFUSED", text, field=f"{FIELD}.create_topics")
    if code in (KafkaError.INVALID_RECORD, KafkaError.TOPIC_EXCEPTION):
        return UserError("SINK_RECORD_REFUSED", text, field=f"{FIELD}.topic")
    if code in _UNKNOWN:
        return UnknownOutcomeError("SINK_TIMEOUT", text)
    return RetryableError("SINK_ERROR", text)
