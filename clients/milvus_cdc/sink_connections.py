"""How many connections one process has to a sink, as far as that can be said."""

from __future__ import annotations

from milvuscdc.v1 import task_pb2

POSTGRES_CONNECTIONS = 4
"""Where the task does not say it."""


def connections_each(sink: task_pb2.Sink) -> int:
    """Of one replicator, for all collections of all tasks with this sink; 0 where it is up to the
    sink's client.
    """
    match sink.WhichOneof("kind"):
        case "milvus":
            return 1
        case "postgres":
            return sink.postgres.max_connections or POSTGRES_CONNECTIONS
        case _:
            return 0
