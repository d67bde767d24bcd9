"""Which adapter reads which queue."""

from __future__ import annotations

from milvus_cdc.source import KafkaConfig, LogSource, NatsConfig, QueueConfig


def open_source(config: QueueConfig) -> LogSource:
    """The source for a queue; it connects on first use."""
    # Imported on use: a reader of one queue does not load the other's client.
    match config:
        case NatsConfig():
            from milvus_cdc.source.nats import NatsSource

            return NatsSource(config)
        case KafkaConfig():
            from milvus_cdc.source.kafka import KafkaSource

            return KafkaSource(config)
