"""A row as one JSON object, as flat JSON, Debezium's envelope and CloudEvents hold it.

Fields stand under their names in the order of the schema. The fields that a row brings beyond the
schema (`$meta`) stand beside them, as Milvus itself shows them to a query; where one has the name
of a field of the schema, the row's whole dynamic object stands under `$meta` instead, so that
nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pyarrow as pa

from milvus_cdc.format import assemble, json_cells
from milvus_cdc.format.json_cells import JsonStyle
from milvus_cdc.rows import DYNAMIC_FIELD, Table


def objects(
    table: Table,
    batch: pa.RecordBatch,
    style: JsonStyle,
    *,
    before: Sequence[assemble.Part] = (),
    after: Sequence[assemble.Part] = (),
    merge_dynamic: bool = True,
) -> list[bytes]:
    """`{"field": value, ...}` of each whole row, with parts around it."""
    parts: list[assemble.Part] = [*before]
    names = frozenset(field.name for field in table.fields)
    opening = b"{"
    for field, column in zip(table.fields, batch.columns, strict=True):
        if field.dynamic and merge_dynamic:
            parts.append([_dynamic(text, names) for text in json_cells.texts(column)])
        else:
            parts.append(opening + orjson.dumps(field.name) + b":")
            parts.append(json_cells.cells(field, column, style))
        opening = b","
    return assemble.join_rows([*parts, b"}", *after])


def keys(table: Table, batch: pa.RecordBatch, style: JsonStyle) -> list[bytes]:
    """The primary key of each row as JSON; `batch` holds whole rows or keys alone."""
    return json_cells.cells(table.key, batch.column(table.key.name), style)


def key_objects(table: Table, keys: list[bytes]) -> list[bytes]:
    """`{"field": key}`."""
    return assemble.join_rows([b"{" + orjson.dumps(table.key.name) + b":", keys, b"}"])


def _dynamic(text: bytes | None, names: frozenset[str]) -> bytes:
    """What follows the fields of the schema, from the comma on."""
    if not text or text == b"{}":
        return b""
    text, value = json_cells.json_text(text)
    if not isinstance(value, dict) or not names.isdisjoint(value):
        return b"," + orjson.dumps(DYNAMIC_FIELD) + b":" + text
    return b"," + text.strip()[1:-1] if value else b""
