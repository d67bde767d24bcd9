"""Flat JSON: a row is one object of its fields, its key the plain value of the primary key.

A delete is a key without a value, which compacted topics and table readers take as one. What
happened and when stands in the headers that the sink adds.
"""

from __future__ import annotations

from milvus_cdc.format import Record, assemble, json_rows, schema_event
from milvus_cdc.format.json_cells import PLAIN, JsonStyle
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.writer import SchemaChange


class FlatJson:
    content_type = "application/json"

    def __init__(self, style: JsonStyle = PLAIN) -> None:
        self._style = style

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        records: list[Record] = []
        for batch in assemble.chunks(changes.arrow(table)):
            keys = json_rows.keys(table, batch, self._style)
            if changes.op is ChangeOp.DELETE:
                records += [Record(key, None) for key in keys]
                continue
            values = json_rows.objects(table, batch, self._style)
            records += map(Record, keys, values)
        return records

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        return schema_event.json_record(change, table)

    async def close(self) -> None:
        pass
