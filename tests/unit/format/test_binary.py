"""Avro and Protobuf, read back by fastavro and protobuf with the schema that the registry has."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import fastavro
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_tools import protoc  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.errors import BugError, RetryableError, UserError
from milvus_cdc.format import Record, schema_event
from milvus_cdc.format.avro import AvroFormat
from milvus_cdc.format.protobuf import ProtobufFormat
from milvus_cdc.format.registry import open_format
from milvus_cdc.format.schema_registry import Registry
from milvus_cdc.rows import ChangeOp, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.writer import SchemaChange, SchemaChangeKind
from milvuscdc.v1 import format_pb2

from tests.servers import Authority
from tests.servers.registry import SchemaRegistryServer
from tests.unit.format import tables
from tests.unit.format.tables import T

EVERY = tables.every_type()
NULLABLE = tables.every_type(nullable=True)
NULLABLE_VECTORS = tables.every_type(nullable=True, nullable_vectors=True)
SECRETS = SecretResolver(env_prefix="CDC_", environ={"CDC_PASSWORD": "open sesame"})
AVRO, PROTOBUF = "avro", "protobuf"


@pytest.fixture(scope="module")
def registry() -> Iterator[SchemaRegistryServer]:
    with SchemaRegistryServer() as server:
        yield server


def opened(server: SchemaRegistryServer, **more: Any) -> Registry:
    spec = format_pb2.SchemaRegistry(url=server.url, **more)
    return Registry(spec, SECRETS, "sink.kafka.format.avro.registry")


def format_of(kind: str, registry: Registry, arrays: bool = False) -> AvroFormat | ProtobufFormat:
    made = AvroFormat if kind == AVRO else ProtobufFormat
    return made(registry, arrays=arrays)


def read(server: SchemaRegistryServer, kind: str, data: bytes | None) -> Any:
    """As a consumer does: the schema by the id in the record, the rest by a library."""
    assert data is not None
    assert data[0] == 0
    schema = server.schema(int.from_bytes(data[1:5], "big"))
    if kind == AVRO:
        stream = io.BytesIO(data[5:])
        value = fastavro.schemaless_reader(stream, fastavro.parse_schema(json.loads(schema)))
        assert not stream.read()
        return value
    at, body = (0, data[6:]) if data[5] == 0 else (data[6] >> 1, data[7:])
    message = message_factory.GetMessageClass(compiled(schema, at)).FromString(body)
    assert not len(UnknownFieldSet(message))
    return message


@lru_cache
def compiled(schema: str, at: int) -> Any:
    """The text as protoc understands it."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "a.proto").write_text(schema)
        arguments = ["protoc", f"-I{folder}", f"--descriptor_set_out={folder}/out", "a.proto"]
        assert protoc.main(arguments) == 0, schema
        files = descriptor_pb2.FileDescriptorSet.FromString((Path(folder) / "out").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(files.file[0])
    return pool.FindMessageTypeByName(
        f"{files.file[0].package}.{files.file[0].message_type[at].name}"
    )


def number_vector(kind: FieldType, wanted: Any) -> list[float]:
    if kind is T.BFLOAT16_VECTOR:
        return [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in wanted]
    return list(wanted)


def little_endian(kind: FieldType, wanted: Any) -> bytes:
    letters = {
        T.FLOAT_VECTOR: "f",
        T.FLOAT16_VECTOR: "e",
        T.BFLOAT16_VECTOR: "H",
        T.INT8_VECTOR: "b",
        T.BINARY_VECTOR: "B",
    }
    if kind is T.SPARSE_FLOAT_VECTOR:
        return b"".join(struct.pack("<If", *pair) for pair in sorted(wanted.items()))
    return struct.pack(f"<{len(wanted)}{letters[kind]}", *wanted)


def plain(value: Any, field: Any, name: str) -> Any:
    """What a Protobuf message holds under `name`, as fastavro shows a record's field."""
    held = getattr(value, name)
    if field.nullable or field.dynamic:
        if not value.HasField(name):
            return None
        held = held.values if isinstance(held, Message) else held  # type: ignore[attr-defined]
    return held if isinstance(held, bool | int | float | str | bytes) else plain_list(held)


def plain_list(held: Any) -> list[Any]:
    return [entry(each) if isinstance(each, Message) else each for each in held]


def entry(of: Any) -> dict[str, Any]:
    return {"index": of.index, "value": of.value}


def check_row(kind: str, found: Any, row: dict[str, Any], table: Table, arrays: bool) -> None:
    for field in table.fields:
        name = "_meta" if field.dynamic else field.name
        value = found[name] if kind == AVRO else plain(found, field, name)
        wanted = row[field.name]
        if wanted is None:
            assert value is None
        elif field.type is T.JSON:
            assert json.loads(value) == json.loads(wanted)
        elif not field.type.is_vector:
            np.testing.assert_equal(value, wanted)
            assert type(value) is type(wanted)
        elif not arrays or field.type is T.BINARY_VECTOR:
            assert value == little_endian(field.type, wanted)
        elif field.type is T.SPARSE_FLOAT_VECTOR:
            pairs = sorted(wanted.items())
            assert value == [{"index": index, "value": each} for index, each in pairs]
        else:
            np.testing.assert_equal(value, number_vector(field.type, wanted))


def check(
    server: SchemaRegistryServer, kind: str, records: list[Record], rows: list[Any], *more: Any
) -> None:
    for record, row in zip(records, rows, strict=True):
        key = read(server, kind, record.key)
        assert (key["id"] if kind == AVRO else key.id) == row["id"]
        check_row(kind, read(server, kind, record.value), row, *more)


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
@pytest.mark.parametrize("table", [EVERY, NULLABLE, NULLABLE_VECTORS])
async def test_every_type(
    registry: SchemaRegistryServer, kind: str, table: Table, arrays: bool
) -> None:
    registry.compatibility = "NONE"
    format = format_of(kind, opened(registry), arrays)
    await format.prepare(table, f"{kind}{arrays}")
    rows = [tables.row(at) for at in range(4)]
    if table is not EVERY:
        nothing = {field.name: None for field in table.fields if field.nullable}
        rows[1] |= nothing
        rows[3] |= nothing
    empty: dict[str, Any] = {name: [] for name in rows[0] if name.startswith("some_")}
    rows[2] |= empty | {"sparse": {}, "a_varchar": "", "a_float": math.nan, "a_double": -math.inf}
    rows[0] |= {"a_varchar": "long" * 20_000, "some_varchar": ["long" * 1_000]}
    records = format.encode(table, tables.changes(table, rows, ChangeOp.UPDATE))
    check(registry, kind, records, rows, table, arrays)
    gone = format.encode(table, tables.deletes(table, [2**63 - 1, 3]))
    assert [record.value for record in gone] == [None, None]
    assert gone[1].key == records[3].key
    await format.close()


numbers = st.floats(width=32)
any_rows = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(-(2**63), 2**63 - 1),
            "a_bool": st.none() | st.booleans(),
            "a_int8": st.none() | st.integers(-128, 127),
            "a_int32": st.none() | st.integers(-(2**31), 2**31 - 1),
            "a_int64": st.none() | st.integers(-(2**63), 2**63 - 1),
            "a_float": st.none() | numbers,
            "a_double": st.none() | st.floats(),
            "a_varchar": st.none() | st.text() | st.text(min_size=1).map(lambda text: text * 3000),
            "some_bool": st.none() | st.lists(st.booleans(), max_size=3),
            "some_int8": st.none() | st.lists(st.integers(-128, 127), max_size=3),
            "some_int64": st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
            "some_float": st.none() | st.lists(numbers, max_size=3),
            "some_varchar": st.none() | st.lists(st.text(), max_size=3),
            "int8vector": st.lists(st.integers(-128, 127), min_size=8, max_size=8),
            "floatvector": st.lists(numbers, min_size=8, max_size=8),
            "binaryvector": st.binary(min_size=1, max_size=1),
            "sparse": st.dictionaries(
                st.integers(0, 2**32 - 2), st.floats(width=32, allow_nan=False), max_size=3
            ),
        }
    ),
    min_size=1,
    max_size=4,
)


Formats: TypeAlias = dict[tuple[str, bool], AvroFormat | ProtobufFormat]


@pytest.fixture(scope="module")
async def prepared(registry: SchemaRegistryServer) -> AsyncIterator[Formats]:
    registry.compatibility = "NONE"
    formats = {
        (kind, arrays): format_of(kind, opened(registry), arrays)
        for kind in (AVRO, PROTOBUF)
        for arrays in (False, True)
    }
    for format in formats.values():
        await format.prepare(NULLABLE)
    yield formats
    for format in formats.values():
        await format.close()


@given(kind=st.sampled_from([AVRO, PROTOBUF]), arrays=st.booleans(), rows=any_rows)
@settings(deadline=None, max_examples=80)
def test_any_row_comes_back(
    registry: SchemaRegistryServer,
    prepared: Formats,
    kind: str,
    arrays: bool,
    rows: list[dict[str, Any]],
) -> None:
    whole = [tables.row(**row) for row in rows]
    records = prepared[kind, arrays].encode(NULLABLE, tables.changes(NULLABLE, whole))
    check(registry, kind, records, whole, NULLABLE, arrays)


@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
async def test_many_rows(
    registry: SchemaRegistryServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc.format.assemble._CHUNK_BYTES", 10_000)
    registry.compatibility = "NONE"
    format = format_of(kind, opened(registry))
    await format.prepare(NULLABLE, f"many-{kind}")
    edges = [sign * 2**bits + more for bits in range(63) for sign in (1, -1) for more in (-1, 0, 1)]
    some = {"a_int32": None, "a_varchar": None, "some_int64": None}
    rows = [
        tables.row(at % 100, id=edge, a_int64=edge, some_int64=[edge] * (at % 4))
        | (some if at % 5 == 0 else {})
        for at, edge in enumerate(edges)
    ]
    records = format.encode(NULLABLE, tables.changes(NULLABLE, rows))
    await format.close()
    check(registry, kind, records, rows, NULLABLE, False)


NAMES = tables.table(
    tables.field("id", T.VARCHAR, 0, primary_key=True),
    tables.field("_meta", T.INT64, 1),
    tables.field("message", T.JSON, 2, description="a\nlong\ttext"),
    tables.field("fooBar", T.BOOL, 3),
    tables.field("foo_bar", T.BOOL, 4),
    tables.field("vec", T.SPARSE_FLOAT_VECTOR, 5),
    tables.field("vec_Entry", T.ARRAY, 6, element_type=T.INT64, nullable=True),
    tables.field("vec_Entry_List", T.INT8, 7),
    tables.field("option", T.INT8, 8),
    tables.field("Value", T.ARRAY, 9, element_type=T.INT64, nullable=True),
    tables.field("$meta", T.JSON, 10, dynamic=True),
    database="7 seas",
    collection="a.b",
)


@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
async def test_names_of_all_sorts(registry: SchemaRegistryServer, kind: str) -> None:
    format = format_of(kind, opened(registry), arrays=True)
    await format.prepare(NAMES)
    row = {
        "id": "k",
        "_meta": 5,
        "message": "{}",
        "fooBar": True,
        "foo_bar": False,
        "vec": {1: 2.0},
        "vec_Entry": [1],
        "vec_Entry_List": 3,
        "option": 4,
        "Value": [9],
        "$meta": '{"x":1}',
    }
    record = format.encode(NAMES, tables.changes(NAMES, [row]))[0]
    await format.close()
    found = read(registry, kind, record.value)
    get = found.__getitem__ if kind == AVRO else lambda name: getattr(found, name)
    other = ("_meta_", "foo_bar") if kind == AVRO else ("_meta__11", "foo_bar_5")
    assert (get("_meta"), get(other[0]), get("option")) == (5, '{"x":1}', 4)
    assert (get("fooBar"), get(other[1]), get("vec_Entry_List")) == (True, False, 3)
    if kind == PROTOBUF:
        shown = json_format.MessageToDict(found, always_print_fields_with_no_presence=True)
        assert shown.keys() == row.keys()
    schema = registry.schema(int.from_bytes((record.value or b"")[1:5], "big"))
    assert "milvus._7_x20_seas.a_x2e_b" in schema


OLD = tables.table(
    tables.field("id", T.INT64, 0, primary_key=True),
    tables.field("title", T.VARCHAR, 1),
    tables.field("$meta", T.JSON, 2, dynamic=True),
)


@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
async def test_a_field_is_added(registry: SchemaRegistryServer, kind: str) -> None:
    registry.compatibility = "BACKWARD"
    added = tables.field("lang", T.VARCHAR, 3, nullable=True)
    new = tables.table(*OLD.fields[:2], added, OLD.fields[2], schema_version=2)
    format = format_of(kind, opened(registry))
    await format.prepare(OLD, f"grows-{kind}")
    before = format.encode(OLD, tables.changes(OLD, [{"id": 1, "title": "a", "$meta": "{}"}]))[0]
    await format.prepare(new, f"grows-{kind}")
    row = {"id": 2, "title": "b", "lang": "fr", "$meta": '{"n":1}'}
    after = format.encode(new, tables.changes(new, [row]))[0]
    await format.close()
    assert len(registry.subjects[f"grows-{kind}-value"]) == 2
    assert len(registry.subjects[f"grows-{kind}-key"]) == 1
    assert before.value is not None
    assert after.value is not None
    old_id, new_id = (int.from_bytes(each.value[1:5], "big") for each in (before, after))  # type: ignore[index]
    # Whoever has the new schema reads old rows, whoever has the old one reads new rows.
    if kind == AVRO:
        schemas = [json.loads(registry.schema(each)) for each in (old_id, new_id)]
        of_old = fastavro.schemaless_reader(io.BytesIO(before.value[5:]), schemas[0], schemas[1])
        of_new = fastavro.schemaless_reader(io.BytesIO(after.value[5:]), schemas[1], schemas[0])
        assert of_old == {"id": 1, "title": "a", "lang": None, "_meta": "{}"}
        assert of_new == {"id": 2, "title": "b", "_meta": '{"n":1}'}
    else:
        parse: list[Any] = [
            message_factory.GetMessageClass(compiled(registry.schema(each), 0)).FromString
            for each in (old_id, new_id)
        ]
        assert not parse[1](before.value[6:]).HasField("lang")
        assert (parse[0](after.value[6:]).title, parse[0](after.value[6:])._meta) == (
            "b",
            '{"n":1}',
        )


@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
async def test_another_collection_in_the_place_of_one(
    registry: SchemaRegistryServer, kind: str
) -> None:
    registry.compatibility = "BACKWARD"
    other = tables.table(OLD.key, tables.field("title", T.DOUBLE, 1))
    format = format_of(kind, opened(registry))
    await format.prepare(OLD, f"shared-{kind}")
    with pytest.raises(UserError) as raised:
        await format.prepare(other, f"shared-{kind}")
    assert raised.value.reason == "SCHEMA_INCOMPATIBLE"
    assert f"shared-{kind}-value" in raised.value.message
    assert "another type" in raised.value.message
    assert raised.value.field == "sink.kafka.format.avro.registry.subject"
    await format.close()


CHANGES = [
    None,
    SchemaChange(SchemaChangeKind.CREATE_PARTITION, EVERY, partition="p1"),
    SchemaChange(SchemaChangeKind.RENAME_COLLECTION, EVERY, renamed_from=("default", "old")),
]


@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
@pytest.mark.parametrize("change", CHANGES)
async def test_schema_changes(
    registry: SchemaRegistryServer, kind: str, change: SchemaChange | None
) -> None:
    registry.compatibility = "NONE"
    format = format_of(kind, opened(registry))
    with pytest.raises(BugError):
        format.encode_schema(change, EVERY)
    await format.prepare(EVERY, "rows", f"changes-{kind}")
    record = format.encode_schema(change, EVERY)
    await format.close()
    key, value = read(registry, kind, record.key), read(registry, kind, record.value)
    wanted = schema_event.event(change, EVERY)
    if kind == AVRO:
        assert value == wanted
        assert key == {"database": "default", "collection": "articles"}
    else:
        assert {name: getattr(value, name) for name in schema_event.EVENT_TYPES} == {
            name: wanted[name] for name in schema_event.EVENT_TYPES
        }
        assert [
            {name: getattr(each, name) for name in schema_event.FIELD_TYPES}
            for each in value.fields
        ] == wanted["fields"]
        assert (key.database, key.collection) == ("default", "articles")
    assert {f"changes-{kind}-key", f"changes-{kind}-value"} <= registry.subjects.keys()


async def test_unprepared_rows_are_a_bug(registry: SchemaRegistryServer) -> None:
    for kind in (AVRO, PROTOBUF):
        with pytest.raises(BugError):
            format_of(kind, opened(registry)).encode(EVERY, tables.deletes(EVERY, [1]))


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        ("SUBJECT_STRATEGY_UNSPECIFIED", "t-key", "t-value"),
        ("SUBJECT_STRATEGY_TOPIC", "t-key", "t-value"),
        ("SUBJECT_STRATEGY_RECORD", "milvus.default.articles.Key", "milvus.default.articles.Value"),
        (
            "SUBJECT_STRATEGY_TOPIC_RECORD",
            "t-milvus.default.articles.Key",
            "t-milvus.default.articles.Value",
        ),
    ],
)
@pytest.mark.parametrize("kind", [AVRO, PROTOBUF])
async def test_subjects(kind: str, strategy: str, key: str, value: str) -> None:
    with SchemaRegistryServer() as server:
        format = format_of(kind, opened(server, subject=strategy))
        await format.prepare(OLD, "t")
        await format.prepare(OLD, "t")
        await format.close()
        assert sorted(server.subjects) == sorted([key, value])
        assert len(server.requests) == 2


async def test_login() -> None:
    with SchemaRegistryServer(username="cdc", password="open sesame") as server:
        password = {"env": "CDC_PASSWORD"}
        settings = {"url": server.url, "username": "cdc", "password": password}
        spec = json_format.ParseDict({"avro": {"registry": settings}}, format_pb2.Format())
        format = open_format(spec, SECRETS, "sink.kafka.format")
        await format.prepare(OLD, "t")
        await format.close()
        nobody = AvroFormat(opened(server))
        with pytest.raises(UserError) as raised:
            await nobody.prepare(OLD, "t")
        assert raised.value.reason == "REGISTRY_DENIED"
        await nobody.close()
        with pytest.raises(UserError):
            opened(server, password=password)


async def test_tls(tmp_path: Path) -> None:
    authority, stranger = (Authority(tmp_path / name, name) for name in ("ours", "theirs"))
    with SchemaRegistryServer(authority=authority) as server:
        for ca_file in (authority.ca_file, stranger.ca_file, ""):
            format = AvroFormat(opened(server, ca_file=str(ca_file)))
            if ca_file == authority.ca_file:
                await format.prepare(OLD, "t")
            else:
                with pytest.raises(UserError) as raised:
                    await format.prepare(OLD, "t")
                assert raised.value.reason == "REGISTRY_CERTIFICATE"
                assert raised.value.field == "sink.kafka.format.avro.registry.caFile"
            await format.close()
    assert server.subjects


async def test_look_up_only(registry: SchemaRegistryServer) -> None:
    registry.compatibility = "NONE"
    format = AvroFormat(opened(registry, lookup_only=True))
    for topic in ("looked-up", "sl/ash ü"):
        with pytest.raises(UserError) as raised:
            await format.prepare(OLD, topic)
        assert raised.value.reason == "SCHEMA_NOT_REGISTERED"
        owner = AvroFormat(opened(registry))
        await owner.prepare(OLD, topic)
        await owner.close()
        await format.prepare(OLD, topic)
    assert "sl/ash ü-value" in registry.subjects
    await format.close()


async def test_registry_down_and_back() -> None:
    server = SchemaRegistryServer()
    format = ProtobufFormat(opened(server))
    with pytest.raises(RetryableError) as raised:
        await format.prepare(OLD, "t")
    assert raised.value.reason == "REGISTRY_UNAVAILABLE"
    with server:
        server.answer_with = (503, b"<html>busy</html>")
        with pytest.raises(RetryableError):
            await format.prepare(OLD, "t")
        server.answer_with = None
        await format.prepare(OLD, "t")
    # What is known needs no registry.
    await format.prepare(OLD, "t")
    assert format.encode(OLD, tables.deletes(OLD, [1]))[0].key
    await format.close()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"<html>", "REGISTRY_NOT_FOUND"),
        (200, b"[]", "REGISTRY_NOT_FOUND"),
        (404, b"not here", "REGISTRY_NOT_FOUND"),
        (301, b"", "REGISTRY_NOT_FOUND"),
        (403, b'{"error_code":40301,"message":"no"}', "REGISTRY_DENIED"),
        (422, b'{"error_code":42201,"message":"bad"}', "SCHEMA_REFUSED"),
    ],
)
async def test_what_only_a_person_can_mend(status: int, body: bytes, reason: str) -> None:
    with SchemaRegistryServer() as server:
        server.answer_with = (status, body)
        format = AvroFormat(opened(server))
        with pytest.raises(UserError) as raised:
            await format.prepare(OLD, "t")
        assert raised.value.reason == reason
        await format.close()


async def test_read_only_registry() -> None:
    with SchemaRegistryServer() as server:
        server.read_only = True
        format = AvroFormat(opened(server))
        with pytest.raises(UserError, match="read-only"):
            await format.prepare(OLD, "t")
        await format.close()


def test_authorities_that_cannot_be_read(tmp_path: Path) -> None:
    spec = format_pb2.SchemaRegistry(url="https://localhost:1", ca_file=str(tmp_path / "no.pem"))
    with pytest.raises(UserError) as raised:
        Registry(spec, SECRETS, "sink.kafka.format.avro.registry")
    assert raised.value.field == "sink.kafka.format.avro.registry.caFile"
