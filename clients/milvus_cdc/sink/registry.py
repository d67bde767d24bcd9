"""Which sink a task's `sink` means. Adapters are imported when a task first asks for theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milvuscdc.v1 import task_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.milvus_endpoint import open_endpoint
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.writer import Writer

if TYPE_CHECKING:
    from milvus_cdc.sink.milvus import MilvusSink


def open_milvus(spec: task_pb2.MilvusEndpoint, secrets: SecretResolver) -> MilvusSink:
    """No I/O yet. Raises UserError for a secret that cannot be resolved."""
    from milvus_cdc.sink.milvus import MilvusSink

    return MilvusSink(open_endpoint(spec, secrets, who="sink"))


def open_writer(spec: task_pb2.Sink, secrets: SecretResolver) -> Writer:
    """Of every kind but `milvus`; no I/O yet. Raises UserError for a secret that cannot be
    resolved, a plugin that is not there, or settings that contradict each other.
    """
    match spec.WhichOneof("kind"):
        case "kafka":
            from milvus_cdc.sink.kafka import KafkaWriter

            return KafkaWriter(spec.kafka, secrets)
        case "files":
            from milvus_cdc.sink.files import FileWriter

            return FileWriter(spec.files, secrets)
        case "postgres":
            from milvus_cdc.sink.postgres import PostgresWriter

            return PostgresWriter(spec.postgres, secrets)
        case "plugin":
            from milvus_cdc.sink import plugin

            writer: Writer = plugin.load(
                plugin.SINKS,
                spec.plugin.name,
                spec.plugin.config,
                secrets=secrets,
                field="sink.plugin",
            )
            return writer
        case other:
            raise UserError(
                "SINK_UNKNOWN", f"no sink of kind {other!r} is known here", field="sink"
            )
