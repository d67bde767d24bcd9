"""Which format a task's spec means, with its options; formats of other packages."""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar

import pytest
from google.protobuf import json_format
from milvus_cdc.errors import UserError
from milvus_cdc.format import Format, Record
from milvus_cdc.format.avro import AvroFormat
from milvus_cdc.format.cloud_events import CloudEventsJson
from milvus_cdc.format.debezium_json import DebeziumJson
from milvus_cdc.format.flat_json import FlatJson
from milvus_cdc.format.legacy_json import LegacyJson
from milvus_cdc.format.protobuf import ProtobufFormat
from milvus_cdc.format.registry import open_format
from milvus_cdc.rows import Changes, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.writer import SchemaChange
from milvuscdc.v1 import format_pb2

from tests.unit.format import tables
from tests.unit.format.tables import T

SECRETS = SecretResolver(env_prefix="CDC_", environ={"CDC_WORD": "hush"})
URL = {"url": "http://localhost:8081"}
TABLE = tables.table(
    tables.field("id", T.INT64, 0, primary_key=True),
    tables.field("vec", T.FLOAT_VECTOR, 1, dim=2),
)
ROWS = tables.changes(TABLE, [{"id": 2**60, "vec": [1.0, 2.0]}])


def opened(spec: dict[str, Any]) -> Any:
    parsed = json_format.ParseDict(spec, format_pb2.Format())
    return open_format(parsed, SECRETS, "sink.kafka.format")


@pytest.mark.parametrize(
    ("spec", "kind", "content_type"),
    [
        ({}, FlatJson, "application/json"),
        ({"flatJson": {}}, FlatJson, "application/json"),
        ({"debeziumJson": {}}, DebeziumJson, "application/json"),
        ({"cloudEventsJson": {}}, CloudEventsJson, "application/cloudevents+json; charset=UTF-8"),
        ({"legacyJson": {}}, LegacyJson, "application/json"),
        ({"avro": {"registry": URL}}, AvroFormat, "application/vnd.apache.avro"),
        ({"protobuf": {"registry": URL}}, ProtobufFormat, "application/x-protobuf"),
    ],
)
def test_kinds(spec: dict[str, Any], kind: type, content_type: str) -> None:
    format: Format = opened(spec)
    assert format.content_type == content_type
    assert isinstance(format, kind)


VALUES = {"vectors": "VECTOR_ENCODING_BASE64", "int64AsString": True}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({}, b'{"id":1152921504606846976,"vec":[1.0,2.0]}'),
        ({"flatJson": {"values": VALUES}}, b'{"id":"1152921504606846976","vec":"AACAPwAAAEA="}'),
        ({"debeziumJson": {"values": VALUES}}, b'"after":{"id":"1152921504606846976","vec":"AA'),
        ({"debeziumJson": {"withSchema": True}}, b'{"schema":{"type":"struct",'),
        ({"cloudEventsJson": {"values": VALUES}}, b'"data":{"id":"1152921504606846976","vec":"AA'),
        (
            {"cloudEventsJson": {"source": "//plant"}},
            b'"source":"//plant/to-kafka/default/articles"',
        ),
    ],
)
def test_options(spec: dict[str, Any], wanted: bytes) -> None:
    assert wanted in opened(spec).encode(TABLE, ROWS)[0].value


class Csv:
    """A format of another package."""

    CONFIG_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "required": ["separator"],
        "properties": {"separator": {"type": "string"}, "word": {"secret": True}},
    }
    content_type = "text/csv"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        return [Record(str(key).encode(), b"") for key in changes.keys(table)]

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        return Record(None, b"")

    async def close(self) -> None:
        pass


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint(
        "csv", "tests.unit.format.test_registry:Csv", "milvus_cdc.formats"
    )

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == point.group else []

    monkeypatch.setattr("milvus_cdc.sink.plugin.entry_points", entry_points)


@pytest.mark.usefixtures("_installed")
def test_formats_of_other_packages() -> None:
    config = {"separator": ";", "word": {"env": "CDC_WORD"}}
    format = opened({"plugin": {"name": "csv", "config": config}})
    assert format.config == {"separator": ";", "word": "hush"}
    assert format.encode(TABLE, ROWS)[0].key == b"1152921504606846976"
    with pytest.raises(UserError) as raised:
        opened({"plugin": {"name": "csv", "config": {"separator": 1}}})
    assert raised.value.field == "sink.kafka.format.plugin.config.separator"
    with pytest.raises(UserError) as raised:
        opened({"plugin": {"name": "tsv"}})
    assert (raised.value.reason, raised.value.field) == (
        "PLUGIN_UNKNOWN",
        "sink.kafka.format.plugin.name",
    )
