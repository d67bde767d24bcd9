"""Debezium's envelope: `before`, `after`, `source`, `op`, `ts_ms`; keys are objects of one field.

An update's and a delete's `before` is all that is known of the old row, its key: Milvus' log does
not hold more, and readers such as Flink refuse an update without any. `after` is the whole row.
With schemas, records are what Kafka Connect's JsonConverter reads and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any

import orjson

from milvus_cdc.format import Record, assemble, connect_schema, json_rows, schema_event
from milvus_cdc.format.json_cells import PLAIN, JsonStyle
from milvus_cdc.model import tso_to_ms
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.writer import SchemaChange, SchemaChangeKind

_OPS = {ChangeOp.CREATE: b"c", ChangeOp.UPDATE: b"u", ChangeOp.DELETE: b"d"}
_TABLE_CHANGES = {
    schema_event.CREATE_COLLECTION: "CREATE",
    SchemaChangeKind.DROP_COLLECTION.value: "DROP",
}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class DebeziumJson:
    content_type = "application/json"

    def __init__(
        self,
        style: JsonStyle = PLAIN,
        *,
        with_schema: bool = False,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self._style = replace(style, json_as_text=with_schema)
        self._with_schema = with_schema
        self._now_ms = now_ms

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        opening, closing = b"", self._closing(table, changes)
        if self._with_schema:
            schema = connect_schema.envelope_schema(table, self._style)
            opening, closing = b'{"schema":' + schema + b',"payload":', closing + b"}"
        records: list[Record] = []
        for batch in assemble.chunks(changes.arrow(table)):
            keys = json_rows.key_objects(table, json_rows.keys(table, batch, self._style))
            before: assemble.Part = b"null" if changes.op is ChangeOp.CREATE else keys
            start: list[assemble.Part] = [opening, b'{"before":', before, b',"after":']
            if changes.op is ChangeOp.DELETE:
                values = assemble.join_rows([*start, b"null", closing])
            else:
                values = json_rows.objects(
                    table,
                    batch,
                    self._style,
                    before=start,
                    after=[closing],
                    merge_dynamic=not self._with_schema,
                )
            if self._with_schema:
                schema = connect_schema.key_schema(table, self._style)
                keys = assemble.join_rows([b'{"schema":', schema, b',"payload":', keys, b"}"])
            records += map(Record, keys, values)
        return records

    def _closing(self, table: Table, changes: Changes) -> bytes:
        wide = str if self._style.int64_as_string else int
        source = {
            **_origin(table),
            "ts_ms": tso_to_ms(changes.ts),
            "snapshot": "false",
            "db": table.source_database,
            "collection": table.source_collection,
            "partition": changes.partition,
            "vchannel": changes.vchannel,
            "order": wide(changes.order),
            "tso": wide(changes.ts),
        }
        return b',"source":%b,"op":"%b","ts_ms":%d}' % (
            orjson.dumps(source),
            _OPS[changes.op],
            self._now_ms(),
        )

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        """As Debezium's schema change topic has it, with the whole event under `milvus`."""
        event = schema_event.event(change, table)
        columns = [
            {
                "name": field.name,
                "typeName": field.type.value,
                "length": field.dim or field.max_length or field.max_capacity,
                "position": position,
                "optional": field.nullable or field.dynamic,
                "autoIncremented": field.auto_id,
                "generated": False,
                "comment": field.description,
            }
            for position, field in enumerate(table.fields, 1)
        ]
        previous = event["renamed_from_database"], event["renamed_from_collection"]
        change_of_table = {
            "type": _TABLE_CHANGES.get(event["change"], "ALTER"),
            "id": _quoted_name(table.database, table.collection),
            "previousId": _quoted_name(*previous) if any(previous) else "",
            "table": {
                "primaryKeyColumnNames": [table.key.name],
                "columns": columns,
                "comment": table.description,
            },
        }
        value = {
            "source": {
                **_origin(table),
                "db": table.source_database,
                "collection": table.source_collection,
            },
            "ts_ms": self._now_ms(),
            "databaseName": table.database,
            "tableChanges": [change_of_table],
            "milvus": event,
        }
        return Record(
            self._plain(
                f"{connect_schema.NAMESPACE}.SchemaChangeKey", {"databaseName": table.database}
            ),
            self._plain(f"{connect_schema.NAMESPACE}.SchemaChangeValue", value),
        )

    def _plain(self, name: str, payload: dict[str, Any]) -> bytes:
        if not self._with_schema:
            return orjson.dumps(payload)
        schema = connect_schema.of_value(name, payload)
        return orjson.dumps({"schema": schema, "payload": payload})

    async def close(self) -> None:
        pass


@cache
def _version() -> str:
    return version("milvus-cdc")


def _origin(table: Table) -> dict[str, str]:
    return {
        "version": _version(),
        "connector": "milvus",
        "name": table.task.removeprefix("tasks/"),
    }


def _quoted_name(database: str, collection: str) -> str:
    return f'"{database}"."{collection}"'
