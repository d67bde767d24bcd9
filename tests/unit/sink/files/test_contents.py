"""Every type is read back as it was written, by pyarrow, DuckDB and as lines of JSON."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.rows import ChangeOp, FieldType, Table
from milvus_cdc.sink.files import encode
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import format_pb2, sink_file_pb2

from tests.unit.format import tables
from tests.unit.sink.files.samples import (
    BEGIN,
    batch,
    gone,
    history_of,
    opened,
    plain,
    put,
    table_of,
    upto,
    writer_for,
)

EVERY = tables.every_type(nullable=True)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/part-*"))


def expected(table: Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Those rows as Arrow makes them from Python."""

    def value(kind: FieldType, given: Any) -> Any:
        match kind:
            case FieldType.BFLOAT16_VECTOR:
                return np.array(given, "<u2").tobytes()
            case FieldType.SPARSE_FLOAT_VECTOR:
                return [{"index": i, "value": v} for i, v in sorted(given.items())]
            case FieldType.FLOAT16_VECTOR:
                return np.array(given, np.float16)
        return given

    columns = []
    for field in table.fields:
        values = [row[field.name] for row in rows]
        columns.append(
            pa.array(
                [None if each is None else value(field.type, each) for each in values],
                field.arrow_type,
            )
        )
    return pa.table(columns, names=[field.name for field in table.fields])


def with_nulls(at: int) -> dict[str, Any]:
    row = tables.row(at)
    if at % 3:
        nullable = [field.name for field in EVERY.fields if field.nullable]
        row |= dict.fromkeys(nullable[at % 3 :: 3])
    return row


@pytest.mark.parametrize("per_request", [1, 7])
@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "ZSTD"])
async def test_parquet_gives_back_every_type(
    tmp_path: Path, compression: str, per_request: int
) -> None:
    parquet = sink_file_pb2.ParquetFiles(
        compression=sink_file_pb2.ParquetCompression.Value(f"PARQUET_COMPRESSION_{compression}")
    )
    writer = await opened(tmp_path, EVERY, parquet=parquet)
    rows = [with_nulls(at) for at in range(21)]
    requests = [
        put(EVERY, rows[at : at + per_request], 1 + at) for at in range(0, len(rows), per_request)
    ]
    await writer.write(EVERY, batch(*requests, gone([3], 50)), 20)
    await writer.close()
    [path] = parts(tmp_path)
    read = pq.read_table(path, partitioning=None)
    names = [field.name for field in EVERY.fields]
    assert read.slice(0, 21).select(names).equals(expected(EVERY, rows))
    deleted = read.slice(21).to_pylist()[0]
    assert {name for name, value in deleted.items() if value is not None} == {
        "id",
        *(field.name for field in encode.OWN_COLUMNS),
    }
    assert (deleted["id"], deleted["_op"], deleted["_partition"]) == (3, "DELETE", "")
    assert read.schema.field("bfloat16vector").metadata == {
        b"milvus.type": b"BFloat16Vector",
        b"milvus.dim": b"8",
    }
    wanted = expected(EVERY, rows).filter(pa.compute.not_equal(pa.array(range(21)), 3))
    assert history_of(tmp_path).state().drop_columns(["_partition"]).equals(wanted)


async def test_duckdb_reads_the_folder(tmp_path: Path) -> None:
    writer = await opened(tmp_path, EVERY)
    rows = [with_nulls(at) for at in range(6)]
    await writer.write(EVERY, batch(put(EVERY, rows, 1), gone([5], 9)), 20)
    await writer.close()
    pattern = f"{tmp_path}/default/articles-449/generation-0001/*/*.parquet"
    source = f"read_parquet('{pattern}', hive_partitioning=true)"
    with duckdb.connect() as connection:
        found = connection.sql(f"SELECT * FROM {source} WHERE _op = 'CREATE' ORDER BY id")
        table = found.to_arrow_table()
        assert set(table.column_names) == {
            *(field.name for field in EVERY.fields),
            *(field.name for field in encode.OWN_COLUMNS),
            "change_date",
        }
        wanted = expected(EVERY, rows)
        for name in wanted.column_names:
            read = table[name].combine_chunks()
            if name == "float16vector":
                # DuckDB has no half precision and reads it as float.
                assert [list(map(float, row)) for row in wanted[name].to_pylist()] == (
                    read.to_pylist()
                )
                continue
            assert read.to_pylist() == wanted[name].to_pylist(), name
        [(day, at, deleted)] = connection.sql(
            f"SELECT change_date::VARCHAR, epoch_ms(_time), id FROM {source} WHERE _op = 'DELETE'"
        ).fetchall()
        assert (day, at, deleted) == ("2025-11-21", BEGIN >> 18, 5)
        # Nearest neighbours, as an analyst would ask.
        nearest = connection.sql(
            f"SELECT id FROM {source} WHERE floatvector IS NOT NULL ORDER BY "
            "array_distance(floatvector::FLOAT[8], "
            f"{rows[0]['floatvector']}::FLOAT[8]) LIMIT 1"
        ).fetchall()
        assert nearest == [(0,)]
        # The last value of each key.
        latest = connection.sql(
            f"SELECT id FROM (SELECT *, row_number() OVER (PARTITION BY id ORDER BY _ts DESC) AS r "
            f"FROM {source}) WHERE r = 1 AND _op <> 'DELETE' ORDER BY id"
        ).fetchall()
        assert latest == [(0,), (1,), (2,), (3,), (4,)]


async def test_text_keys(tmp_path: Path) -> None:
    key = tables.field("id", FieldType.VARCHAR, 0, primary_key=True, max_length=99)
    table = table_of(key, tables.field("n", FieldType.INT64, 1))
    writer = await opened(tmp_path, table)
    rows = [{"id": f"ключ'\"{at}", "n": at} for at in range(50)]
    gone_keys = [row["id"] for row in rows[::2]]
    await writer.write(table, batch(put(table, rows, 1), gone(gone_keys, 2)), 10)
    history = history_of(tmp_path)
    wanted = [row for row in rows if row["id"] not in gone_keys]
    assert history.state().drop_columns(["_partition"]).to_pylist() == wanted
    few = [row for each in history.rows(history.masks(3000)) for row in each.to_pylist()]
    assert sorted(row["n"] for row in few) == [row["n"] for row in wanted]
    await writer.close()


async def test_requests_of_other_columns_side_by_side(tmp_path: Path) -> None:
    """A request before a field was added, and ones in another order of fields."""
    table = table_of(
        *table_of().fields, tables.field("s", FieldType.VARCHAR, 3, nullable=True, max_length=9)
    )
    writer = await opened(tmp_path, table)
    older = put(table_of(), plain([1], n=1), 1)
    whole = put(table, [{**plain([2], n=2)[0], "s": "x"}], 2)
    turned = put(table, [{**plain([3], n=3)[0], "s": None}], 3)
    object.__setattr__(turned, "columns", turned.columns[::-1])
    await writer.write(table, batch(older, whole, turned), 10)
    state = history_of(tmp_path).state().to_pylist()
    assert [(row["id"], row["n"], row["s"]) for row in state] == [
        (1, 1, None),
        (2, 2, "x"),
        (3, 3, None),
    ]
    await writer.close()


async def test_vectors_cost_about_their_bytes(tmp_path: Path) -> None:
    dim, count = 128, 4000
    vector = tables.field("v", FieldType.FLOAT_VECTOR, 1, dim=dim)
    table = table_of(tables.field("id", FieldType.INT64, 0, primary_key=True), vector)
    numbers = random.Random(1)
    rows = [{"id": at, "v": [numbers.gauss(0, 1) for _ in range(dim)]} for at in range(count)]
    writer = await opened(tmp_path, table)
    await writer.write(table, batch(put(table, rows, 1)), 20)
    await writer.close()
    [file] = history_of(tmp_path).files
    assert file.entry.bytes < 0.95 * count * dim * 4


# ---- lines of JSON


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", ["flat_json", "debezium_json", "cloud_events_json"])
async def test_lines_of_json(tmp_path: Path, kind: str, compress: bool) -> None:
    table = table_of()
    lines = sink_file_pb2.JsonLinesFiles(gzip=compress)
    getattr(lines.format, kind).SetInParent()
    writer = await opened(tmp_path, table, json_lines=lines)
    updated = put(table, plain([2], n=4), 2, op=ChangeOp.UPDATE, partition="p")
    await writer.write(table, batch(put(table, plain([1, 2]), 1), updated, gone([1], 3)), 10)
    await writer.close()
    [path] = parts(tmp_path)
    assert path.name.endswith(".jsonl.gz" if compress else ".jsonl")
    data = gzip.decompress(path.read_bytes()) if compress else path.read_bytes()
    read = [json.loads(line) for line in data.decode().splitlines()]
    assert [(row["_op"], row["_ts"] - BEGIN, row["_order"]) for row in read] == [
        ("CREATE", 1, 1),
        ("CREATE", 1, 1),
        ("UPDATE", 2, 2),
        ("DELETE", 3, 3),
    ]
    assert read[2]["_partition"] == "p"
    assert all(row["_time"] == BEGIN >> 18 for row in read)
    if kind == "flat_json":
        assert read[2]["key"] == 2
        assert read[2]["value"] == {"id": 2, "v": [0.0, 1.0, 2.0, 3.0], "n": 4}
        assert (read[3]["key"], read[3]["value"]) == (1, None)
    # The manifest says the same of them; rows are read back from Parquet only.
    [file] = history_of(tmp_path).files
    assert (file.entry.rows, file.entry.deletes) == (4, 1)
    with pytest.raises(UserError, match="NOT_PARQUET"):
        history_of(tmp_path).state()
    again = writer_for(tmp_path, json_lines=lines)
    assert (await again.open(table, Opening.RESUME, 2)).checkpoints == (upto(3),)
    await again.close()


def test_lines_are_of_json_only(tmp_path: Path) -> None:
    lines = sink_file_pb2.JsonLinesFiles()
    lines.format.avro.registry.url = "http://127.0.0.1:1"
    with pytest.raises(UserError, match="FORMAT_NOT_FOR_LINES") as raised:
        writer_for(tmp_path, json_lines=lines)
    assert raised.value.field == "sink.files.json_lines.format"
    assert format_pb2.Format.DESCRIPTOR is lines.format.DESCRIPTOR
