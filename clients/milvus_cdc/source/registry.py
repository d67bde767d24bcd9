"""Which adapter reads which queue, and what can be said of a queue without asking it."""

from __future__ import annotations

from milvus_cdc.errors import BugError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import (
    KafkaConfig,
    LogSource,
    NatsConfig,
    PulsarConfig,
    QueueConfig,
    positions,
    pulsar_positions,
)


def open_source(config: QueueConfig, secrets: SecretResolver | None = None) -> LogSource:
    """The source for a queue; it connects on first use. `secrets` says which ones may be used: none
    when it is left out.
    """
    # Imported on use: a reader of one queue does not load the other's client.
    match config:
        case NatsConfig():
            from milvus_cdc.source.nats import NatsSource

            return NatsSource(config, secrets)
        case KafkaConfig():
            from milvus_cdc.source.kafka import KafkaSource

            return KafkaSource(config, secrets)
        case PulsarConfig():
            from milvus_cdc.source.pulsar import PulsarSource

            return PulsarSource(config, secrets)


def position_text(position: bytes) -> str:
    """As the queue's own tools show it."""
    if pulsar_positions.looks_like_one(position):
        return pulsar_positions.text(position)
    try:
        return positions.text(position)
    except BugError:
        return position.hex()
