"""JSON of every type, read back by Python's own json; envelopes, keys, deletes, schema changes."""

from __future__ import annotations

import base64
import json
import math
import struct
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.format import Format, Record
from milvus_cdc.format.cloud_events import CloudEventsJson
from milvus_cdc.format.debezium_json import DebeziumJson
from milvus_cdc.format.flat_json import FlatJson
from milvus_cdc.format.json_cells import JsonStyle
from milvus_cdc.format.legacy_json import LegacyJson
from milvus_cdc.rows import ChangeOp, Table
from milvus_cdc.sink.writer import SchemaChange, SchemaChangeKind

from tests.unit.format import tables
from tests.unit.format.tables import T, f32, named

EVERY = tables.every_type()
NULLABLE = tables.every_type(nullable=True)
NOW = 1_700_000_009_000


def loads(record: Record) -> Any:
    assert record.value is not None
    return json.loads(record.value)


def same_f32(found: list[Any], wanted: list[float]) -> bool:
    return [each if isinstance(each, str) else f32(each) for each in found] == [
        named(each) for each in wanted
    ]


def check_row(found: dict[str, Any], row: dict[str, Any], table: Table) -> None:
    """`found` is the flat object of `row`."""
    rest = dict(found)
    for field in table.fields:
        if field.dynamic:
            continue
        value, wanted = rest.pop(field.name), row[field.name]
        if wanted is None:
            assert value is None
            continue
        match field.type:
            case T.FLOAT:
                assert same_f32([value], [wanted])
            case T.DOUBLE:
                assert value == named(wanted)
            case T.JSON:
                assert value == json.loads(wanted)
            case T.ARRAY if field.element_type is T.FLOAT:
                assert same_f32(value, wanted)
            case T.ARRAY if field.element_type is T.DOUBLE:
                assert value == [named(each) for each in wanted]
            case T.FLOAT_VECTOR:
                assert same_f32(value, wanted)
            case T.FLOAT16_VECTOR:
                assert [float(np.float16(each)) for each in value] == wanted
            case T.BFLOAT16_VECTOR:
                words = [struct.unpack("<I", struct.pack("<f", each))[0] >> 16 for each in value]
                assert words == wanted
            case T.BINARY_VECTOR:
                assert bytes(value) == wanted
            case T.SPARSE_FLOAT_VECTOR:
                assert {int(index): f32(each) for index, each in value.items()} == wanted
            case _:
                assert value == wanted
                assert type(value) is type(wanted)
    assert rest == json.loads(row["$meta"] or "{}")


@pytest.mark.parametrize("op", [ChangeOp.CREATE, ChangeOp.UPDATE])
def test_every_type(op: ChangeOp) -> None:
    rows = [tables.row(at) for at in range(5)]
    records = FlatJson().encode(EVERY, tables.changes(EVERY, rows, op))
    assert [record.key for record in records] == [b"0", b"1", b"2", b"3", b"4"]
    for record, row in zip(records, rows, strict=True):
        check_row(loads(record), row, EVERY)
        assert record.value is not None
        assert b"\n" not in record.value


def test_nulls() -> None:
    names = [field.name for field in NULLABLE.fields if field.nullable]
    nothing: dict[str, Any] = {name: None for name in names}
    rows = [tables.row(0), tables.row(1, **nothing), tables.row(2)]
    records = FlatJson().encode(NULLABLE, tables.changes(NULLABLE, rows))
    for record, row in zip(records, rows, strict=True):
        check_row(loads(record), row, NULLABLE)


@pytest.mark.parametrize("base64_vectors", [False, True])
def test_null_vectors(base64_vectors: bool) -> None:
    table = tables.every_type(nullable_vectors=True)
    names = [field.name for field in table.fields if field.type.is_vector]
    rows = [tables.row(0), tables.row(1, **dict.fromkeys(names)), tables.row(2)]
    format = FlatJson(JsonStyle(base64_vectors=base64_vectors))
    found = [loads(each) for each in format.encode(table, tables.changes(table, rows))]
    whole = tables.every_type()
    wanted = format.encode(whole, tables.changes(whole, [rows[0], tables.row(1), rows[2]]))
    assert [found[0], found[2]] == [loads(wanted[0]), loads(wanted[2])]
    assert found[1] == loads(wanted[1]) | dict.fromkeys(names)


def test_columns_that_a_message_leaves_out_are_null() -> None:
    changes = tables.changes(NULLABLE, [tables.row(3)])
    kept = {"id", "floatvector", "float16vector", "bfloat16vector", "int8vector", "binaryvector"}
    columns = zip(NULLABLE.fields, changes.columns, strict=True)
    few = tuple(column for field, column in columns if field.name in kept | {"sparse"})
    short = type(changes)(changes.op, changes.ts, "v", 1, "", 1, few)
    value = loads(FlatJson().encode(NULLABLE, short)[0])
    assert value["a_varchar"] is None
    assert value["some_int8"] is None
    assert "extra" not in value


SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]


@pytest.mark.parametrize("value", SPECIAL)
def test_numbers_that_json_does_not_have(value: float) -> None:
    narrow = value if not math.isfinite(value) else f32(1.4e-45)
    row = tables.row(
        a_double=value,
        a_float=narrow,
        some_double=[1.0, value],
        some_float=[narrow, 2.0],
        floatvector=[narrow] + [1.5] * 7,
    )
    records = FlatJson().encode(EVERY, tables.changes(EVERY, [tables.row(), row]))
    found = loads(records[1])
    assert found["a_double"] == (wanted := named(value))
    assert found["some_double"] == [1.0, wanted]
    assert same_f32(found["floatvector"], row["floatvector"])
    assert same_f32([found["a_float"]], [narrow])
    if value == 0:
        assert math.copysign(1, found["a_double"]) == -1


def test_int64_as_strings_also_in_keys() -> None:
    style = JsonStyle(int64_as_string=True)
    record = FlatJson(style).encode(EVERY, tables.changes(EVERY, [tables.row(7)]))[0]
    assert record.key == b'"7"'
    assert loads(record)["a_int64"] == str(-(2**63) + 7)
    assert loads(record)["some_int64"] == [str(2**63 - 1), str(-(2**63))]
    assert loads(record)["a_int32"] == 2**31 - 8
    key = DebeziumJson(style).encode(EVERY, tables.deletes(EVERY, [2**63 - 1]))[0].key
    assert key == b'{"id":"9223372036854775807"}'


def test_vectors_as_base64() -> None:
    row = tables.row(3)
    style = JsonStyle(base64_vectors=True)
    found = loads(FlatJson(style).encode(EVERY, tables.changes(EVERY, [tables.row(), row]))[1])
    vectors = [field.name for field in EVERY.fields if field.type.is_vector]
    raw = {name: base64.b64decode(found[name], validate=True) for name in vectors}
    assert raw["floatvector"] == struct.pack("<8f", *row["floatvector"])
    assert raw["float16vector"] == struct.pack("<8e", *row["float16vector"])
    assert raw["bfloat16vector"] == struct.pack("<8H", *row["bfloat16vector"])
    assert raw["int8vector"] == struct.pack("<8b", *row["int8vector"])
    assert raw["binaryvector"] == row["binaryvector"]
    pairs = sorted(row["sparse"].items())
    assert raw["sparse"] == b"".join(struct.pack("<If", *pair) for pair in pairs)


DYNAMIC = tables.table(
    tables.field("id", T.INT64, 0, primary_key=True),
    tables.field("doc", T.JSON, 1),
    tables.field("$meta", T.JSON, 2, dynamic=True),
)


def flat(doc: str = "{}", meta: str = "{}") -> str:
    changes = tables.changes(DYNAMIC, [{"id": 1, "doc": doc, "$meta": meta}])
    value = FlatJson().encode(DYNAMIC, changes)[0].value
    assert value is not None
    return value.decode()


def test_dynamic_fields_stand_beside_the_others() -> None:
    assert flat(meta='{"a": 1, "b": [2]}') == '{"id":1,"doc":{},"a": 1, "b": [2]}'
    assert flat(meta=" {} ") == '{"id":1,"doc":{}}'


@pytest.mark.parametrize("meta", ['{"a":1,"doc":2}', '{"$meta":{"x":1}}', '{"id":"no"}', "[1]"])
def test_dynamic_fields_of_a_taken_name_keep_their_object(meta: str) -> None:
    assert flat(meta=meta) == '{"id":1,"doc":{},"$meta":' + meta + "}"


def test_json_is_the_text_that_was_stored() -> None:
    digits = '{"n":123456789012345678901234567890.123456789012345678901,"e":1e400}'
    assert flat(digits) == '{"id":1,"doc":' + digits + "}"
    exact = json.loads(flat(digits), parse_float=Decimal)["doc"]["n"]
    assert exact == Decimal("123456789012345678901234567890.123456789012345678901")
    escaped = '"\\ud800 half"'
    assert flat(escaped) == '{"id":1,"doc":' + escaped + "}"


def test_json_has_no_line_breaks() -> None:
    assert json.loads(flat('{\r\n  "a": "b\\nc"\n}'))["doc"] == {"a": "b\nc"}
    assert "\n" not in flat('{\r\n  "a": "b\\nc"\n}', '{\n"x":\n1}')


def test_json_that_is_none() -> None:
    assert json.loads(flat('{"a": [NaN, -Infinity], "NaN": "Infinity"}'))["doc"] == {
        "a": ["NaN", "-Infinity"],
        "NaN": "Infinity",
    }
    assert json.loads(flat('{"a": '))["doc"] == '{"a": '
    assert json.loads(flat('{"a": 1}', meta='{"b": NaN}')) == {"id": 1, "doc": {"a": 1}, "b": "NaN"}
    deep = "[" * 50_000 + "]" * 50_000
    assert json.loads(flat(deep))["doc"] == deep


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(
    doc=json_values,
    extra=st.dictionaries(st.text(), json_values, max_size=4),
    ascii_only=st.booleans(),
    indent=st.none() | st.just(1),
)
@settings(deadline=None)
def test_any_json_comes_back(
    doc: Any, extra: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    found = json.loads(flat(dump(doc), dump(extra)))
    taken = {"id", "doc", "$meta"} & extra.keys()
    if taken:
        extra = {"$meta": extra}
    text = json.dumps({"id": 1, "doc": doc, **extra})
    # Python writes infinities as words of its own, we as strings.
    assert found == json.loads(text, parse_constant=lambda word: word)


finite = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "id": st.integers(-(2**63), 2**63 - 1),
                "a_bool": st.booleans(),
                "a_float": finite,
                "a_double": st.floats(),
                "a_varchar": st.text(),
                "some_float": st.lists(finite, max_size=3),
                "some_varchar": st.lists(st.text(), max_size=3),
                "some_int64": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
                "floatvector": st.lists(finite, min_size=8, max_size=8),
                "sparse": st.dictionaries(
                    st.integers(0, 2**32 - 2),
                    st.floats(width=32, allow_nan=False, allow_infinity=False),
                    max_size=3,
                ),
            }
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=60)
def test_any_row_comes_back(rows: list[dict[str, Any]]) -> None:
    whole = [tables.row(**row) for row in rows]
    for record, row in zip(
        FlatJson().encode(EVERY, tables.changes(EVERY, whole)), whole, strict=True
    ):
        check_row(loads(record), row, EVERY)
        assert json.loads(record.key or b"") == row["id"]


def test_large_batches_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milvus_cdc.format.assemble._CHUNK_BYTES", 300)
    rows = [tables.row(at, a_varchar=None if at % 3 == 0 else f"x{at}") for at in range(20)]
    for format in (FlatJson(), DebeziumJson(), CloudEventsJson(), LegacyJson()):
        records = format.encode(NULLABLE, tables.changes(NULLABLE, rows))
        assert len(records) == 20
    for record, row in zip(
        FlatJson().encode(NULLABLE, tables.changes(NULLABLE, rows)), rows, strict=True
    ):
        check_row(loads(record), row, NULLABLE)


STRING_KEYS = tables.table(
    tables.field("name", T.VARCHAR, 0, primary_key=True, max_length=100),
    tables.field("n", T.INT32, 1),
)


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        (FlatJson(), [b'"a\\"\\n"', '"ü"'.encode()]),
        (LegacyJson(), [b'"a\\"\\n"', '"ü"'.encode()]),
        (CloudEventsJson(), [b'"a\\"\\n"', '"ü"'.encode()]),
        (DebeziumJson(), [b'{"name":"a\\"\\n"}', '{"name":"ü"}'.encode()]),
    ],
)
def test_a_row_and_its_delete_have_one_key(format: Format, keys: list[bytes]) -> None:
    rows = [{"name": 'a"\n', "n": 1}, {"name": "ü", "n": 2}]
    assert [r.key for r in format.encode(STRING_KEYS, tables.changes(STRING_KEYS, rows))] == keys
    gone = format.encode(STRING_KEYS, tables.deletes(STRING_KEYS, ['a"\n', "ü"]))
    assert [record.key for record in gone] == keys


def test_flat_deletes_have_no_value() -> None:
    records = FlatJson().encode(EVERY, tables.deletes(EVERY, [5, -(2**63)]))
    assert [(r.key, r.value) for r in records] == [(b"5", None), (b"-9223372036854775808", None)]


SOURCE = {
    "connector": "milvus",
    "name": "to-kafka",
    "ts_ms": 1_700_000_000_123,
    "snapshot": "false",
    "db": "default",
    "collection": "articles",
    "partition": "_default",
    "vchannel": "by-dev-rootcoord-dml_0_449v0",
    "order": 17,
    "tso": tables.TS,
}


@pytest.mark.parametrize(
    ("op", "letter", "before"),
    [(ChangeOp.CREATE, "c", None), (ChangeOp.UPDATE, "u", {"id": 4})],
)
def test_debezium_rows(op: ChangeOp, letter: str, before: Any) -> None:
    format = DebeziumJson(now_ms=lambda: NOW)
    record = format.encode(EVERY, tables.changes(EVERY, [tables.row(4)], op))[0]
    value = loads(record)
    check_row(value.pop("after"), tables.row(4), EVERY)
    assert value["source"].pop("version")
    assert value == {"before": before, "source": SOURCE, "op": letter, "ts_ms": NOW}
    assert json.loads(record.key or b"") == {"id": 4}


def test_debezium_deletes() -> None:
    value = loads(DebeziumJson(now_ms=lambda: NOW).encode(EVERY, tables.deletes(EVERY, [9]))[0])
    assert (value["op"], value["before"], value["after"]) == ("d", {"id": 9}, None)
    assert value["source"]["order"] == 18


def conforms(value: Any, schema: dict[str, Any]) -> None:
    """As Kafka Connect's JsonConverter reads it: what is required is there, and of its type."""
    if value is None:
        assert schema["optional"]
        return
    match schema["type"]:
        case "struct":
            assert value.keys() == {field["field"] for field in schema["fields"]}
            for field in schema["fields"]:
                conforms(value[field["field"]], field)
        case "array":
            for each in value:
                conforms(each, schema["items"])
        case "map":
            assert schema["keys"]["type"] == "string"
            for each in value.values():
                conforms(each, schema["values"])
        case "bytes":
            base64.b64decode(value, validate=True)
        case "boolean":
            assert isinstance(value, bool)
        case "string":
            assert isinstance(value, str)
        case "float" | "double":
            assert isinstance(value, float | int)
        case integer:
            bits = int(integer.removeprefix("int"))
            assert isinstance(value, int)
            assert -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


@pytest.mark.parametrize(
    "style",
    [JsonStyle(), JsonStyle(base64_vectors=True), JsonStyle(int64_as_string=True)],
)
def test_debezium_with_schemas(style: JsonStyle) -> None:
    format = DebeziumJson(style, with_schema=True)
    nothing = {field.name: None for field in NULLABLE.fields if field.nullable}
    first = tables.changes(NULLABLE, [tables.row(1)])
    records = [
        *format.encode(
            NULLABLE, tables.changes(NULLABLE, [tables.row(1), tables.row(2, **nothing)])
        ),
        *format.encode(NULLABLE, tables.changes(NULLABLE, [tables.row(1)], ChangeOp.UPDATE)),
        *format.encode(NULLABLE, tables.deletes(NULLABLE, [3])),
        *format.encode(NULLABLE, replace(first, columns=first.columns[:-1])),
        format.encode_schema(None, NULLABLE),
    ]
    for record in records:
        for text in (record.key, record.value):
            parsed = json.loads(text or b"")
            assert parsed.keys() == {"schema", "payload"}
            conforms(parsed["payload"], parsed["schema"])
    after = loads(records[0])["payload"]["after"]
    assert json.loads(after["a_json"])["at"] == 1
    assert json.loads(after["$meta"]) == {"extra": 1, "more": ["x"]}


def test_cloud_events() -> None:
    format = CloudEventsJson(source="/plant-7/")
    rows = [tables.row(1), tables.row(2)]
    records = format.encode(EVERY, tables.changes(EVERY, rows, ChangeOp.UPDATE))
    value = loads(records[1])
    check_row(value.pop("data"), rows[1], EVERY)
    assert value == {
        "specversion": "1.0",
        "type": "io.milvuscdc.row.updated",
        "source": "/plant-7/to-kafka/default/articles",
        "id": "by-dev-rootcoord-dml_0_449v0/17/update/1",
        "subject": "2",
        "time": "2023-11-14T22:13:20.123Z",
        "datacontenttype": "application/json",
        "vchannel": "by-dev-rootcoord-dml_0_449v0",
        "logorder": "17",
        "tso": str(tables.TS),
        "partitionname": "_default",
    }
    gone = loads(format.encode(EVERY, tables.deletes(EVERY, [8]))[0])
    assert (gone["type"], gone["data"]) == ("io.milvuscdc.row.deleted", {"id": 8})
    assert "partitionname" not in gone


def test_legacy() -> None:
    row = tables.row(6)
    record = LegacyJson().encode(EVERY, tables.changes(EVERY, [row]))[0]
    value = loads(record)
    assert value["info"] == "insert data"
    cells = {each["name"]: each for each in json.loads(value["data"])}
    assert list(cells) == [field.name for field in EVERY.fields]
    assert cells["a_int8"] == {"name": "a_int8", "type": "Int8", "value": -122}
    assert cells["a_varchar"]["value"] == row["a_varchar"]
    assert cells["a_json"]["value"] == json.loads(row["a_json"])
    assert base64.b64decode(cells["binaryvector"]["value"]) == row["binaryvector"]
    assert base64.b64decode(cells["float16vector"]["value"]) == struct.pack(
        "<8e", *row["float16vector"]
    )
    gone = loads(LegacyJson().encode(EVERY, tables.deletes(EVERY, [8]))[0])
    assert gone["info"] == "delete data"
    assert json.loads(gone["data"]) == {"name": "id", "type": "Int64", "value": 8}


CHANGES = [
    None,
    SchemaChange(SchemaChangeKind.DROP_COLLECTION, EVERY),
    SchemaChange(SchemaChangeKind.CREATE_PARTITION, EVERY, partition="p1"),
    SchemaChange(SchemaChangeKind.DROP_PARTITION, EVERY, partition="p1"),
    SchemaChange(SchemaChangeKind.RENAME_COLLECTION, EVERY, renamed_from=("default", "old")),
]


@pytest.mark.parametrize("change", CHANGES)
def test_schema_changes(change: SchemaChange | None) -> None:
    kind = "CREATE_COLLECTION" if change is None else change.kind.value
    plain = FlatJson().encode_schema(change, EVERY)
    event = loads(plain)
    assert json.loads(plain.key or b"") == "default.articles"
    assert (event["change"], event["collection"]) == (kind, "articles")
    assert event["partition"] == (change.partition if change else "")
    assert event["renamed_from_collection"] == (change.renamed_from[1] if change else "")
    assert [each["name"] for each in event["fields"]] == [field.name for field in EVERY.fields]
    assert event["fields"][-3]["dim"] == tables.DIM

    assert loads(CloudEventsJson().encode_schema(change, EVERY))["data"] == event
    debezium = loads(DebeziumJson().encode_schema(change, EVERY))
    assert debezium["milvus"] == event
    wanted = {"CREATE_COLLECTION": "CREATE", "DROP_COLLECTION": "DROP"}.get(kind, "ALTER")
    assert debezium["tableChanges"][0]["type"] == wanted
    assert debezium["tableChanges"][0]["table"]["primaryKeyColumnNames"] == ["id"]
    legacy = loads(LegacyJson().encode_schema(change, EVERY))
    assert legacy["info"] == kind.replace("_", " ").lower()
    data = json.loads(legacy["data"])
    assert data["Database"] == "default"
    if change is None:
        assert data["Schema"]["Fields"][0]["DataType"] == 5
        assert data["Schema"]["EnableDynamicField"] is True
    else:
        assert data["CollectionName"] == "articles"
        assert data.get("PartitionName", "") == change.partition
