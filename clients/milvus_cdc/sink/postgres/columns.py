"""Which columns a collection's table has, and why a collection cannot have one.

| Milvus | PostgreSQL |
|---|---|
| Bool; Int8, Int16; Int32; Int64 | boolean; smallint; integer; bigint |
| Float; Double | real; double precision |
| VarChar | text |
| JSON, `$meta` | jsonb |
| Array | array of the element's type |
| FloatVector, BFloat16Vector | vector(dim): every bfloat16 is a float32 |
| Float16Vector | halfvec(dim) |
| Int8Vector | smallint[] |
| BinaryVector | bit(dim), the highest bit of the first byte first, as `numpy.packbits` has it |
| SparseFloatVector | jsonb {"index": value}, or sparsevec(1000000000) |

Beside them `_partition` (text, empty where Milvus places rows by a partition key) and `_ts`
(bigint, the TSO of the row's last change). Limits of pgvector: https://github.com/pgvector/pgvector#reference
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from milvus_cdc.rows import Field, FieldType, Table
from milvus_cdc.sink.postgres.settings import FIELD, MAX_NAME_BYTES, Settings

PARTITION_COLUMN = "_partition"
TS_COLUMN = "_ts"
MAX_VECTOR_DIM = 16_000
"""Of `vector` and `halfvec`: VECTOR_MAX_DIM, HALFVEC_MAX_DIM in pgvector's source."""
MAX_SPARSE_DIM = 1_000_000_000
"""SPARSEVEC_MAX_DIM."""
MAX_COLUMNS = 1_600

_SCALARS = {
    FieldType.BOOL: "boolean",
    FieldType.INT8: "smallint",
    FieldType.INT16: "smallint",
    FieldType.INT32: "integer",
    FieldType.INT64: "bigint",
    FieldType.FLOAT: "real",
    FieldType.DOUBLE: "double precision",
    FieldType.VARCHAR: "text",
    FieldType.JSON: "jsonb",
}
_PGVECTOR = ("vector", "halfvec", "sparsevec")
_RESERVED = frozenset(
    (PARTITION_COLUMN, TS_COLUMN, "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid")
)
"""Ours, and those that every PostgreSQL table has already."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `sql_type` as `format_type` shows it, without the schema of an extension."""

    name: str
    sql_type: str

    @property
    def pgvector(self) -> str:
        """The extension's type, empty for a type of PostgreSQL's own."""
        name = self.sql_type.partition("(")[0]
        return name if name in _PGVECTOR else ""


def sql_type(field: Field, *, sparsevec: bool) -> str | None:
    """None where there is none."""
    if (scalar := _SCALARS.get(field.type)) is not None:
        return scalar
    match field.type:
        case FieldType.ARRAY if field.element_type in _SCALARS:
            return f"{_SCALARS[field.element_type]}[]"
        case FieldType.FLOAT_VECTOR | FieldType.BFLOAT16_VECTOR if field.dim <= MAX_VECTOR_DIM:
            return f"vector({field.dim})"
        case FieldType.FLOAT16_VECTOR if field.dim <= MAX_VECTOR_DIM:
            return f"halfvec({field.dim})"
        case FieldType.INT8_VECTOR:
            return "smallint[]"
        case FieldType.BINARY_VECTOR:
            return f"bit({field.dim})"
        case FieldType.SPARSE_FLOAT_VECTOR:
            return f"sparsevec({MAX_SPARSE_DIM})" if sparsevec else "jsonb"
    return None


def columns_of(table: Table, settings: Settings) -> tuple[Column, ...]:
    """Of a table without violations: its fields in their order, then our own two."""
    fields = (
        Column(field.name, sql_type(field, sparsevec=settings.sparsevec) or "")
        for field in table.fields
    )
    return (*fields, Column(PARTITION_COLUMN, "text"), Column(TS_COLUMN, "bigint"))


def violations(tables: Sequence[Table], settings: Settings) -> list[str]:
    """Why these cannot be held side by side."""
    found: list[str] = []
    by_name: dict[tuple[str, str], list[str]] = defaultdict(list)
    for table in tables:
        name = settings.names(table.database, table.collection)
        by_name[name].append(table.full_name)
        found.extend(_of_name(table, name, settings))
        found.extend(_of_fields(table, settings))
    for place, those in by_name.items():
        if len(those) > 1:
            found.append(
                f"{' and '.join(sorted(those))} would share the table {'.'.join(place)}: use "
                f"{{database}} and {{collection}} in {FIELD}.schema and {FIELD}.table"
            )
    return found


def _of_name(table: Table, name: tuple[str, str], settings: Settings) -> list[str]:
    found = []
    for part, text in zip(("schema", "table"), name, strict=True):
        if not text or len(text.encode()) > MAX_NAME_BYTES or "\0" in text:
            found.append(
                f"{table.full_name}: {text!r} cannot name its {part}, PostgreSQL allows 1 to "
                f"{MAX_NAME_BYTES} bytes: change {FIELD}.{part} or rename it in the task"
            )
    schema = name[0]
    if schema.startswith("pg_") or schema == "information_schema":
        found.append(f"{table.full_name}: PostgreSQL keeps the schema {schema} for itself")
    if schema == settings.checkpoint_schema:
        found.append(
            f"{table.full_name}: the schema {schema} holds the sink's own tables: change "
            f"{FIELD}.checkpoint_schema"
        )
    return found


def _of_fields(table: Table, settings: Settings) -> list[str]:
    found = []
    for field in table.fields:
        place = f"{table.full_name}: field {field.name}"
        if len(field.name.encode()) > MAX_NAME_BYTES:
            found.append(f"{place} is longer than {MAX_NAME_BYTES} bytes, so no column can be it")
        if field.name in _RESERVED:
            found.append(f"{place} has the name of a column that the table has anyway")
        if sql_type(field, sparsevec=settings.sparsevec) is None:
            element = f" of {field.element_type}" if field.element_type else ""
            dim = f" of {field.dim} dimensions" if field.dim else ""
            found.append(
                f"{place}: no column type holds {field.type}{element}{dim}"
                + (f" (pgvector: at most {MAX_VECTOR_DIM})" if field.dim else "")
            )
    if len(table.fields) + 2 > MAX_COLUMNS:
        found.append(f"{table.full_name}: more than {MAX_COLUMNS} columns")
    return found
