"""Rows and schema changes to Apache Kafka; docs/kafka.md says what a consumer finds."""

from milvus_cdc.sink.kafka.writer import KafkaWriter

__all__ = ["KafkaWriter"]
