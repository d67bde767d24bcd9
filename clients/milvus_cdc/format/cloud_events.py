"""CloudEvents 1.0 in structured mode: one JSON object with the event's attributes and `data`.

Facts: CloudEvents specification 1.0.2, JSON format and Kafka protocol binding (the `content-type`
header, which the sink makes of `content_type`, tells structured mode). `id` is where the row stands
in the source's log, so a record that comes again after a failure has the same one. Extension
attributes are strings: CloudEvents' integers have 32 bits.
"""

from __future__ import annotations

import time
import uuid
from urllib.parse import quote

import orjson

from milvus_cdc.format import Record, assemble, json_rows, schema_event
from milvus_cdc.format.json_cells import PLAIN, JsonStyle
from milvus_cdc.model import ms_to_text, tso_to_text
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.writer import SchemaChange

DEFAULT_SOURCE = "/milvus-cdc"
_TYPES = {
    ChangeOp.CREATE: "io.milvuscdc.row.created",
    ChangeOp.UPDATE: "io.milvuscdc.row.updated",
    ChangeOp.DELETE: "io.milvuscdc.row.deleted",
}
_SCHEMA_TYPE = "io.milvuscdc.schema.changed"


class CloudEventsJson:
    content_type = "application/cloudevents+json; charset=UTF-8"

    def __init__(self, style: JsonStyle = PLAIN, source: str = "") -> None:
        self._style = style
        self._source = source or DEFAULT_SOURCE

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        attributes = {
            "specversion": "1.0",
            "type": _TYPES[changes.op],
            "source": self._source_of(table),
            "time": tso_to_text(changes.ts),
            "datacontenttype": "application/json",
            "vchannel": changes.vchannel,
            "logorder": str(changes.order),
            "tso": str(changes.ts),
            **({"partitionname": changes.partition} if changes.partition else {}),
            **({"traceparent": changes.traceparent} if changes.traceparent else {}),
        }
        place = f"{changes.vchannel}/{changes.order}/{changes.op.value.lower()}/"
        opening = orjson.dumps(attributes)[:-1] + b',"id":' + orjson.dumps(place)[:-1]
        records: list[Record] = []
        row = 0
        for batch in assemble.chunks(changes.arrow(table)):
            keys = json_rows.keys(table, batch, self._style)
            numbers = [b"%d" % each for each in range(row, row + len(keys))]
            row += len(keys)
            start: list[assemble.Part] = [opening, numbers, b'","subject":', _strings(keys)]
            start.append(b',"data":')
            if changes.op is ChangeOp.DELETE:
                data = json_rows.key_objects(table, keys)
                values = assemble.join_rows([*start, data, b"}"])
            else:
                values = json_rows.objects(table, batch, self._style, before=start, after=[b"}"])
            records += map(Record, keys, values)
        return records

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        """A change of schema has no place in the log of rows, so each event has an id of its own,
        also when it comes again.
        """
        value = {
            "specversion": "1.0",
            "type": _SCHEMA_TYPE,
            "source": self._source_of(table),
            "time": ms_to_text(time.time_ns() // 1_000_000),
            "datacontenttype": "application/json",
            "id": str(uuid.uuid4()),
            "subject": table.full_name,
            "data": schema_event.event(change, table),
        }
        return Record(orjson.dumps(table.full_name), orjson.dumps(value))

    def _source_of(self, table: Table) -> str:
        """A URI reference: where the row lives at the source."""
        task = table.task.removeprefix("tasks/")
        names = (task, table.source_database, table.source_collection)
        return "/".join(
            [self._source.rstrip("/"), *(quote(each, safe="") for each in names if each)]
        )

    async def close(self) -> None:
        pass


def _strings(keys: list[bytes]) -> list[bytes]:
    """A subject is a string, also where the key is a number."""
    return [key if key[:1] == b'"' else b'"' + key + b'"' for key in keys]
