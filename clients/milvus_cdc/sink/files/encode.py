"""Changes as the content of files: Parquet, or lines of JSON.

Laws: rows stand in the order in which they take effect. A row has the columns of its table, types
as in `milvus_cdc.rows`, all of them nullable, and ours; a delete has its key and nulls. Vectors
stay fixed-size lists; the little-endian words of bfloat16 and the bits of binary vectors are bytes,
and the field's metadata says which (`milvus.type`, `milvus.dim`).
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from milvuscdc.v1 import sink_file_pb2

from milvus_cdc.codec import arrow
from milvus_cdc.codec.columns import concat, field_id
from milvus_cdc.errors import UserError
from milvus_cdc.format import Format
from milvus_cdc.model import tso_to_ms
from milvus_cdc.rows import ChangeOp, Changes, FieldType, Table
from milvus_cdc.sink.files import places
from milvus_cdc.sink.files.store import Bytes

OWN_COLUMNS = (
    pa.field("_op", pa.string(), nullable=False),
    pa.field("_ts", pa.int64(), nullable=False),
    pa.field("_time", pa.timestamp("ms", tz="UTC"), nullable=False),
    pa.field("_vchannel", pa.string(), nullable=False),
    pa.field("_order", pa.int64(), nullable=False),
    pa.field("_partition", pa.string(), nullable=False),
)
"""What happened, when (TSO and time), where in the log, and in which partition."""
RESERVED = frozenset({places.DATE_KEY, *(field.name for field in OWN_COLUMNS)})

_ROW_GROUP_BYTES = 32 * 2**20
_MERGE_BELOW_ROWS = 512
"""Requests with fewer rows on average are joined as bytes, which costs less than decoding each."""
_FLOATS = {FieldType.FLOAT_VECTOR, FieldType.FLOAT, FieldType.DOUBLE}
"""Not half floats: DuckDB (2.0.0) refuses to read those split."""
_TEXTS = {FieldType.VARCHAR, FieldType.JSON}
_COMPRESSIONS = {
    sink_file_pb2.PARQUET_COMPRESSION_NONE: "none",
    sink_file_pb2.PARQUET_COMPRESSION_SNAPPY: "snappy",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """The rows of one day."""

    day: date
    data: Bytes
    rows: int
    deletes: int
    min_ts: int
    max_ts: int

    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def encode(
    changes: Sequence[Changes], content: Callable[[list[Changes]], Bytes]
) -> Iterator[Encoded]:
    """One for each run of changes of the same day, in order."""
    present = (each for each in changes if each.num_rows)
    for day, run in groupby(present, key=lambda each: places.day_of(each.ts)):
        chosen = list(run)
        yield Encoded(
            day=day,
            data=content(chosen),
            rows=sum(each.num_rows for each in chosen),
            deletes=sum(each.num_rows for each in chosen if each.op is ChangeOp.DELETE),
            min_ts=min(each.ts for each in chosen),
            max_ts=max(each.ts for each in chosen),
        )


# ---- Parquet


def file_schema(table: Table) -> pa.Schema:
    fields = []
    for field in table.fields:
        metadata = {"milvus.type": field.type.value}
        if field.dim:
            metadata["milvus.dim"] = str(field.dim)
        fields.append(pa.field(field.name, field.arrow_type, nullable=True, metadata=metadata))
    metadata = {
        "milvus_cdc.collection": f"{table.source_database}.{table.source_collection}",
        "milvus_cdc.collection_id": str(table.collection_id),
        "milvus_cdc.key": table.key.name,
    }
    return pa.schema([*fields, *OWN_COLUMNS], metadata=metadata)


def arrow_table(table: Table, changes: Sequence[Changes]) -> pa.Table:
    """All of them with `file_schema`."""
    schema = file_schema(table)
    runs = [_rows(table, run) for run in _runs(changes)]
    columns = [
        pa.chunked_array([run[at] for run in runs], type=field.arrow_type)
        for at, field in enumerate(table.fields)
    ]
    counts = np.fromiter((each.num_rows for each in changes), np.int64, len(changes))
    ts = np.repeat(np.fromiter((each.ts for each in changes), np.int64, len(changes)), counts)
    orders = np.repeat(
        np.fromiter((each.order for each in changes), np.int64, len(changes)), counts
    )
    times = pa.array(ts >> 18).cast(pa.timestamp("ms", tz="UTC"))
    columns += [
        _repeated([each.op.value for each in changes], counts),
        pa.array(ts),
        times,
        _repeated([each.vchannel for each in changes], counts),
        pa.array(orders),
        _repeated([each.partition for each in changes], counts),
    ]
    return pa.table(columns, schema=schema)


def _runs(changes: Sequence[Changes]) -> Iterator[list[Changes]]:
    """Neighbours that can be made into columns together."""
    for _, run in groupby(changes, key=lambda each: each.delete_keys is not None):
        yield list(run)


def _rows(table: Table, run: list[Changes]) -> list[pa.Array]:
    """One array per field of the table."""
    total = sum(each.num_rows for each in run)
    if run[0].delete_keys is not None:
        keys = [pa.array(each.delete_keys, table.key.arrow_type) for each in run]
        return [
            pa.concat_arrays(keys) if field is table.key else pa.nulls(total, field.arrow_type)
            for field in table.fields
        ]
    if len(run) > 1 and total < _MERGE_BELOW_ROWS * len(run):
        return _merged(table, run, total)
    batches = [each.arrow(table) for each in run]
    return [pa.concat_arrays([batch.column(at) for batch in batches]) for at in _places(table)]


def _places(table: Table) -> range:
    return range(len(table.fields))


def _merged(table: Table, run: list[Changes], total: int) -> list[pa.Array]:
    """Small requests joined column by column; of a field that some of them lack the rows of those
    are null, so requests are told apart by what they have.
    """
    arrays: list[list[pa.Array]] = [[] for _ in table.fields]
    ids = {field.field_id for field in table.fields}
    with_ids = [({field_id(column): column for column in each.columns}, each) for each in run]
    for present, group in groupby(with_ids, key=lambda pair: frozenset(pair[0]) & ids):
        members = list(group)
        rows = sum(each.num_rows for _, each in members)
        for at, field in enumerate(table.fields):
            column = None
            if field.field_id in present:
                column = concat([columns[field.field_id] for columns, _ in members])
            arrays[at].append(arrow.decode(column, field.arrow_type, rows))
    return [pa.concat_arrays(each) for each in arrays]


def _repeated(values: list[str], counts: Any) -> pa.Array:
    """Each text as often as its count says."""
    known: dict[str, int] = {}
    codes = np.fromiter((known.setdefault(v, len(known)) for v in values), np.int32, len(values))
    places_of = pa.array(np.repeat(codes, counts))
    return pa.array(list(known), pa.string()).take(places_of)


class Parquet:
    """Makes Parquet files. Texts and our own columns are dictionaries; floats are split into
    their bytes first (BYTE_STREAM_SPLIT), which makes the exponents of vectors compressible.
    """

    suffix = "parquet"

    def __init__(self, spec: sink_file_pb2.ParquetFiles) -> None:
        self._compression = _COMPRESSIONS.get(spec.compression, "zstd")

    def content(self, table: Table, changes: list[Changes]) -> Bytes:
        rows = arrow_table(table, changes)
        split, dictionaries = self._layout(table)
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows,
            sink,
            row_group_size=max(1024, _ROW_GROUP_BYTES * len(rows) // max(1, rows.nbytes)),
            compression=self._compression,
            compression_level=1 if self._compression == "zstd" else None,
            use_dictionary=dictionaries,
            use_byte_stream_split=split if self._compression != "none" else False,
        )
        return memoryview(sink.getvalue()).cast("B")

    def _layout(self, table: Table) -> tuple[list[str], list[str]]:
        """Leaf columns to split, and those to make dictionaries of."""
        split: list[str] = []
        dictionaries = [field.name for field in OWN_COLUMNS]
        for field in table.fields:
            leaf = field.name
            if field.type is FieldType.FLOAT_VECTOR:
                leaf = f"{field.name}.list.element"
            if field.type in _FLOATS:
                split.append(leaf)
            elif field.type in _TEXTS and not field.primary_key:
                dictionaries.append(field.name)
        return split, dictionaries


# ---- lines of JSON


class JsonLines:
    """A line per row: what happened, and the row's key and value as the format writes them."""

    def __init__(self, records: Format, *, compress: bool) -> None:
        self._records = records
        self._compress = compress
        self.suffix = "jsonl.gz" if compress else "jsonl"
        if "json" not in records.content_type:
            raise UserError(
                "FORMAT_NOT_FOR_LINES",
                f"{records.content_type} does not go into lines of JSON; choose one of the JSON "
                "formats, or Parquet",
                field="sink.files.json_lines.format",
            )

    async def prepare(self, table: Table) -> None:
        await self._records.prepare(table)

    async def close(self) -> None:
        await self._records.close()

    def content(self, table: Table, changes: list[Changes]) -> Bytes:
        text = b"".join(self._lines(table, changes))
        # No time of its own inside: the same rows are the same bytes.
        return gzip.compress(text, 6, mtime=0) if self._compress else text

    def _lines(self, table: Table, changes: Iterable[Changes]) -> Iterator[bytes]:
        for each in changes:
            head = orjson.dumps(
                {
                    "_op": each.op.value,
                    "_ts": each.ts,
                    "_time": tso_to_ms(each.ts),
                    "_vchannel": each.vchannel,
                    "_order": each.order,
                    "_partition": each.partition,
                }
            )[:-1]
            for record in self._records.encode(table, each):
                yield b"".join(
                    (
                        head,
                        b',"key":',
                        _one_line(record.key),
                        b',"value":',
                        _one_line(record.value),
                        b"}\n",
                    )
                )


def _one_line(value: bytes | None) -> bytes:
    if value is None:
        return b"null"
    if b"\n" in value:
        return orjson.dumps(orjson.loads(value))
    return value
