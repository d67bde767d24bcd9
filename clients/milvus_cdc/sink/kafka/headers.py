"""What every record says of itself beside its key and value, whatever its format.

| header | of | value |
|---|---|---|
| `cdc.op` | rows | `CREATE`, `UPDATE`, `DELETE` (`milvus_cdc.rows.ChangeOp`) |
| `cdc.ts_ms` | both | when the source took the change, Unix milliseconds |
| `cdc.ts` | both | the same as Milvus' own timestamp (TSO); never falls within a shard |
| `cdc.vchannel` | rows | the source's shard |
| `cdc.position` | rows | the change's number in the log that holds the shard |
| `cdc.event` | schema changes | what changed (`SchemaChangeKind`, or `CREATE_COLLECTION`) |
| `cdc.database`, `cdc.collection` | both | its names at the sink |
| `cdc.collection_id` | both | its id at the source: another one is another collection |
| `cdc.schema_version` | both | grows with each change of the fields |
| `content-type` | both | the value's media type |
| `traceparent` | rows | W3C trace context of the source's request, where it left one |

Values are text, numbers in decimal. A format may add its own. Ten headers cost as much CPU as the
rest of a small record (5 s per million records), so a task can have fewer.
"""

from __future__ import annotations

from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.model import tso_to_ms
from milvus_cdc.rows import Changes, Table

Headers = list[tuple[str, bytes]]


def of_table(table: Table, content_type: str) -> Headers:
    """Those that all records of a collection share."""
    return [
        ("cdc.database", table.database.encode()),
        ("cdc.collection", table.collection.encode()),
        ("cdc.collection_id", b"%d" % table.collection_id),
        ("cdc.schema_version", b"%d" % table.schema_version),
        ("content-type", content_type.encode()),
    ]


def of_changes(
    changes: Changes, table: Table, shared: Headers, wanted: int = sink_kafka_pb2.KAFKA_HEADERS_ALL
) -> Headers:
    """Those that all records of one request of the source share; `wanted` is a KafkaHeaders."""
    if wanted == sink_kafka_pb2.KAFKA_HEADERS_NONE:
        return []
    change = [
        ("cdc.op", changes.op.encode()),
        ("cdc.ts", b"%d" % changes.ts),
        ("cdc.vchannel", changes.vchannel.encode()),
        ("cdc.position", b"%d" % changes.order),
    ]
    if wanted == sink_kafka_pb2.KAFKA_HEADERS_CHANGE:
        return [*change, ("cdc.schema_version", b"%d" % table.schema_version)]
    if changes.traceparent:
        change.append(("traceparent", changes.traceparent.encode()))
    return [*change, ("cdc.ts_ms", b"%d" % tso_to_ms(changes.ts)), *shared]


def of_event(kind: str, shared: Headers, ts: int = 0) -> Headers:
    """Those of a schema change, which the source made at `ts` (TSO; 0: not known)."""
    when = [("cdc.ts", b"%d" % ts), ("cdc.ts_ms", b"%d" % tso_to_ms(ts))] if ts else []
    return [("cdc.event", kind.encode()), *when, *shared]
