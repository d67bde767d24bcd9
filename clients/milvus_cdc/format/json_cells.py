"""Arrow columns as the JSON of their values, one piece of bytes per row.

Laws: numbers are written in the fewest digits that bring back the same value of their own type, so
a float is read as it was written, not as the double next to it; what JSON has no number for (NaN,
the infinities) is a string; the text of a JSON field is inserted as it is, so numbers beyond a
double survive; no piece holds a line break.
"""

from __future__ import annotations

import binascii
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.format import assemble
from milvus_cdc.rows import Field, FieldType

NULL: Final = b"null"
_NAMED = {"nan": b'"NaN"', "inf": b'"Infinity"', "-inf": b'"-Infinity"'}


@dataclass(frozen=True, slots=True)
class JsonStyle:
    """How values look where there is a choice."""

    base64_vectors: bool = False
    """Vectors as base64 of their little-endian bytes instead of arrays of numbers."""
    int64_as_string: bool = False
    json_as_text: bool = False
    """JSON fields as strings that hold JSON, where a schema leaves no other way."""


PLAIN: Final = JsonStyle()


def cells(field: Field, column: pa.Array, style: JsonStyle) -> list[bytes]:
    """The field's values as JSON; `null` where the column has a null."""
    return assemble.with_nulls(_cells(field, column, style), column, NULL)


def _cells(field: Field, column: pa.Array, style: JsonStyle) -> list[bytes]:
    kind = field.type
    if kind is FieldType.SPARSE_FLOAT_VECTOR:
        return _sparse(column, style)
    if kind.is_vector:
        return _base64(column) if style.base64_vectors else _vectors(field, column)
    if kind is FieldType.ARRAY:
        if field.element_type is None:
            raise ValueError(f"the array {field.name} has no type of element")
        elements, ends = assemble.lists(column)
        pieces = assemble.with_nulls(_scalars(field.element_type, elements, style), elements, NULL)
        return [b"[" + b",".join(pieces[a:b]) + b"]" for a, b in pairwise(ends.tolist())]
    return _scalars(kind, column, style)


def _scalars(kind: FieldType, column: pa.Array, style: JsonStyle) -> list[bytes]:
    match kind:
        case FieldType.VARCHAR:
            return list(map(orjson.dumps, column.to_pylist()))
        case FieldType.JSON:
            pieces = [NULL if text is None else json_text(text)[0] for text in texts(column)]
            return [orjson.dumps(p.decode()) for p in pieces] if style.json_as_text else pieces
        case FieldType.BOOL:
            return [b"true" if value else b"false" for value in assemble.numbers(column)]
        case FieldType.INT64 if style.int64_as_string:
            text = _dump(assemble.numbers(column))[1:-1]
            return (b'"' + text.replace(b",", b'","') + b'"').split(b",") if text else []
    values = assemble.numbers(column)
    pieces = _dump(values)[1:-1].split(b",") if len(values) else []
    if values.dtype.kind == "f":
        for at in np.flatnonzero(~np.isfinite(values)).tolist():
            pieces[at] = _NAMED[str(float(values[at]))]
    return pieces


def _dump(values: NDArray[Any]) -> bytes:
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


def _vectors(field: Field, column: pa.Array) -> list[bytes]:
    if not len(column):
        return []
    if field.type is FieldType.BFLOAT16_VECTOR:
        values: NDArray[Any] = assemble.bfloat16(assemble.fixed_bytes(column), field.dim)
    elif field.type is FieldType.BINARY_VECTOR:
        values = np.frombuffer(assemble.fixed_bytes(column), np.uint8).reshape(len(column), -1)
    else:
        values = assemble.numbers(column)
    pieces = [b"[" + row + b"]" for row in _dump(values)[2:-2].split(b"],[")]
    if values.dtype.kind == "f":
        for at in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            row = [_NAMED.get(str(float(each))) or _dump(each) for each in values[at]]
            pieces[at] = b"[" + b",".join(row) + b"]"
    return pieces


def _base64(column: pa.Array) -> list[bytes]:
    flat = assemble.fixed_bytes(column)
    return [_quoted(piece) for piece in assemble.fixed(flat, len(flat) // max(1, len(column)))]


def _quoted(data: bytes) -> bytes:
    return b'"' + binascii.b2a_base64(data, newline=False) + b'"'


def _sparse(column: pa.Array, style: JsonStyle) -> list[bytes]:
    elements, ends = assemble.lists(column)
    if style.base64_vectors:
        return [_quoted(piece) for piece in assemble.sparse_bytes(elements, ends)]
    index, value = elements.flatten()
    pairs = assemble.join_rows(
        [
            b'"',
            _scalars(FieldType.INT64, index, PLAIN),
            b'":',
            _scalars(FieldType.FLOAT, value, PLAIN),
        ]
    )
    return [b"{" + b",".join(pairs[a:b]) + b"}" for a, b in pairwise(ends.tolist())]


def texts(column: pa.Array) -> list[bytes | None]:
    """The strings of a column as UTF-8."""
    found: list[bytes | None] = column.cast(pa.binary()).to_pylist()
    return found


_CONSTANT = re.compile(rb'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)


def json_text(text: bytes) -> tuple[bytes, Any]:
    """(the same JSON without line breaks, what it means roughly: numbers as floats). Milvus stores
    the text of a JSON field as a client sent it and does not always look inside: NaN and Infinity,
    which Python's clients write, become strings, and what is no JSON at all becomes one string.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        text, value = _mended(text)
    if b"\n" in text or b"\r" in text:
        # JSON has line breaks between its tokens only.
        text = text.replace(b"\r", b" ").replace(b"\n", b" ")
    return text, value


def _mended(text: bytes) -> tuple[bytes, Any]:
    # orjson also refuses what is valid: deep nesting, half a surrogate pair as an escape.
    quoted = _CONSTANT.sub(_quote_constant, text)
    try:
        return quoted, json.loads(quoted, parse_int=float)
    except (ValueError, RecursionError):
        word = text.decode()
        return orjson.dumps(word), word


def _quote_constant(found: re.Match[bytes]) -> bytes:
    token = found.group()
    return token if token.startswith(b'"') else b'"' + token + b'"'
