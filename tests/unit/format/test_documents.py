"""The records that docs/formats.md shows are those that the formats write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.format import Format, Record, avro, protobuf, schema_registry
from milvus_cdc.format.cloud_events import CloudEventsJson
from milvus_cdc.format.debezium_json import DebeziumJson
from milvus_cdc.format.flat_json import FlatJson
from milvus_cdc.format.json_cells import JsonStyle
from milvus_cdc.format.legacy_json import LegacyJson
from milvus_cdc.rows import ChangeOp

from tests.unit.format import tables
from tests.unit.format.tables import T

PAGE = Path(__file__).parents[3] / "docs/formats.md"
TABLE = tables.table(
    tables.field("id", T.INT64, 0, primary_key=True),
    tables.field("title", T.VARCHAR, 1, nullable=True),
    tables.field("doc", T.JSON, 2),
    tables.field("embedding", T.FLOAT_VECTOR, 3, dim=4),
    tables.field("$meta", T.JSON, 4, dynamic=True),
)
ROW = {
    "id": 42,
    "title": "Élan",
    "doc": '{"words":[1,2]}',
    "embedding": [0.1, -2.0, 0.5, 3.0],
    "$meta": '{"lang":"fr"}',
}
KEYS = [42]


def row(format: Format, op: ChangeOp = ChangeOp.CREATE) -> Record:
    return format.encode(TABLE, tables.changes(TABLE, [ROW], op))[0]


def delete(format: Format) -> Record:
    return format.encode(TABLE, tables.deletes(TABLE, KEYS))[0]


def shown(record: Record) -> str:
    """One line for the key, one for the value."""
    return "\n".join("(none)" if p is None else p.decode() for p in (record.key, record.value))


def examples() -> dict[str, str]:
    """By the name in the comment before the block."""
    debezium = DebeziumJson(now_ms=lambda: 1_700_000_000_200)
    typed = DebeziumJson(with_schema=True, now_ms=lambda: 1_700_000_000_200)
    return {
        "flat row": shown(row(FlatJson())),
        "flat delete": shown(delete(FlatJson())),
        "flat options": shown(row(FlatJson(JsonStyle(base64_vectors=True, int64_as_string=True)))),
        "flat schema": shown(FlatJson().encode_schema(None, TABLE)),
        "debezium row": shown(row(debezium, ChangeOp.UPDATE)),
        "debezium delete": shown(delete(debezium)),
        "debezium key": (row(typed).key or b"").decode(),
        "cloudevents row": shown(row(CloudEventsJson())),
        "legacy row": shown(row(LegacyJson())),
        "legacy delete": shown(delete(LegacyJson())),
        "avro key": json.dumps(avro.key_schema(TABLE)),
        "avro value": json.dumps(avro.value_schema(TABLE, arrays=False)),
        "protobuf value": protobuf.value_schema(TABLE, arrays=False),
        "protobuf arrays": protobuf.value_schema(TABLE, arrays=True),
        "avro bytes": hexed(avro.AvroFormat),
        "protobuf bytes": hexed(protobuf.ProtobufFormat),
    }


class Ids(schema_registry.Registry):
    """Every schema has the same id."""

    def __init__(self) -> None:
        pass

    def subject(self, topic: str, record: str, part: schema_registry.Part) -> str:
        return topic

    async def schema_id(self, subject: str, kind: schema_registry.SchemaType, schema: str) -> int:
        return 7


def hexed(kind: type[avro.AvroFormat] | type[protobuf.ProtobufFormat]) -> str:
    format = kind(Ids())
    preparing = format.prepare(TABLE)
    with pytest.raises(StopIteration):
        preparing.send(None)
    record = row(format)
    return "\n".join((part or b"").hex(" ") for part in (record.key, record.value))


def written() -> dict[str, str]:
    blocks = re.findall(r"<!-- (.+?) -->\n```\w*\n(.*?)```\n", PAGE.read_text(), re.DOTALL)
    return dict(blocks)


def meaning(text: str) -> Any:
    """Line breaks and blanks between JSON tokens are for people."""
    decoder, at, found = json.JSONDecoder(), 0, []
    text = text.strip().replace("(none)", '"(none)"')
    text = re.sub(r'"version":\s*"[^"]*"', '"version":""', text)
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return text.split()
        found.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return found


def test_every_example_is_shown() -> None:
    assert written().keys() == examples().keys()


@pytest.mark.parametrize("name", examples())
def test_example(name: str) -> None:
    assert meaning(written()[name]) == meaning(examples()[name])
