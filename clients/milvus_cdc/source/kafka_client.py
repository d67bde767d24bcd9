"""What everyone who talks to a source's Kafka shares: settings of the client, and its errors."""

from __future__ import annotations

from typing import Any

import structlog
from confluent_kafka import KafkaError

from milvus_cdc.kafka_codes import NO_RIGHT

log = structlog.get_logger()

DENIED = NO_RIGHT | {KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._AUTHENTICATION}
OUT_OF_RANGE = frozenset((KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE))


def client_settings(brokers: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": brokers,
        "client.id": "milvus-cdc",
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": 1000,
        "socket.keepalive.enable": True,
        "socket.timeout.ms": 10_000,
    }


class ClientLog:
    """Where the client's own log lines go; what matters of them also comes as an error."""

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def log(self, level: int, text: str, *args: Any) -> None:
        log.debug("kafka client", topic=self._topic, level=level, line=text % args)
