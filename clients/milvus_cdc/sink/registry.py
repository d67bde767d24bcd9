"""Which sink a task's `sink` means. Adapters are imported when a task first asks for theirs."""

from __future__ import annotations

from milvuscdc.v1 import secret_pb2, task_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink import Sink
from milvus_cdc.sink.writer import Writer


def open_sink(spec: task_pb2.Sink, secrets: SecretResolver) -> Sink:
    """No I/O yet. Raises UserError for a secret that cannot be resolved, a plugin that is not
    there, or settings that contradict each other.
    """
    if spec.WhichOneof("kind") == "milvus":
        from milvus_cdc.sink.milvus import MilvusSink

        token = resolve(secrets, spec.milvus.token, "sink.milvus.token")
        return MilvusSink(spec.milvus.uri, token)
    from milvus_cdc.sink.writer_sink import WriterSink

    return WriterSink(open_writer(spec, secrets))


def open_writer(spec: task_pb2.Sink, secrets: SecretResolver) -> Writer:
    """Of every kind but `milvus`. Raises as `open_sink`."""
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


def resolve(secrets: SecretResolver, secret: secret_pb2.Secret, field: str) -> str | None:
    """The value of a reference, None when it is unset; `field` is its place in the task."""
    match secret.WhichOneof("ref"):
        case "env":
            return secrets.env(secret.env, field=field)
        case "file":
            return secrets.file(secret.file, field=field)
        case _:
            return None
