"""What every record says of itself beside its key and value, whatever its format.

| header | of | value |
|---|---|---|
| `cdc.op` | rows | `CREATE`, `UPDATE`, `DELETE` (`milvus_cdc.rows.ChangeOp`) |
| `cdc.ts_ms` | rows | when the source took the change, Unix milliseconds |
| `cdc.ts` | rows | the same as Milvus' own timestamp (TSO); never falls within a `cdc.vchannel` |
| `cdc.vchannel` | rows | the source's shard |
| `cdc.position` | rows | the change's number in the log that holds the shard |
| `cdc.event` | schema changes | what changed (`SchemaChangeKind`, or `CREATE_COLLECTION`) |
| `cdc.database`, `cdc.collection` | both | its names at the sink |
| `cdc.collection_id` | both | its id at the source: another one is another collection |
| `cdc.schema_version` | both | grows with each change of the fields |
| `content-type` | both | the value's media type |

Values are text, numbers in decimal. A format may add its own.
"""

from __future__ import annotations

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


def of_changes(changes: Changes, shared: Headers) -> Headers:
    """Those that all records of one request of the source share."""
    return [
        ("cdc.op", changes.op.encode()),
        ("cdc.ts_ms", b"%d" % tso_to_ms(changes.ts)),
        ("cdc.ts", b"%d" % changes.ts),
        ("cdc.vchannel", changes.vchannel.encode()),
        ("cdc.position", b"%d" % changes.order),
        *shared,
    ]


def of_event(kind: str, shared: Headers) -> Headers:
    """Those of a schema change."""
    return [("cdc.event", kind.encode()), *shared]
