"""Columns of a query answer, compared row by row, bit for bit.

A column is the payload of one schema.FieldData (milvus-proto `schema.proto`). Floats are compared
as bits, so NaN equals the same NaN and 0.0 differs from -0.0. JSON (and so `$meta`) is compared by
value, parsed only where the bytes differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pymilvus.grpc_gen import schema_pb2
else:
    from milvus_cdc.milvus_protos import schema_pb2

Indexes = NDArray[np.intp]
Mask = NDArray[np.bool_]


def json_equal(left: bytes, right: bytes) -> bool:
    """Whether two JSON texts mean the same; texts that do not parse are equal only as bytes."""
    if left == right:
        return True
    try:
        return _same(json.loads(left), json.loads(right))
    except ValueError:
        return False


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


@dataclass(frozen=True, slots=True)
class Column:
    """`cells` has one entry per row: an array of unsigned words (1-D, or one line per row), or
    objects."""

    cells: NDArray[Any] | Sequence[Any]
    valid: Mask | None
    is_json: bool
    payload: bytes
    """The whole column serialized; equal payloads mean equal columns."""

    def differs(self, rows: Indexes, other: Column, other_rows: Indexes) -> Mask:
        """For each pair of rows, whether the two cells differ."""
        result = self._cells_differ(rows, other, other_rows)
        if self.valid is None and other.valid is None:
            return result
        mine = np.ones(len(rows), bool) if self.valid is None else self.valid[rows]
        theirs = np.ones(len(rows), bool) if other.valid is None else other.valid[other_rows]
        return np.where(mine & theirs, result, mine != theirs)

    def _cells_differ(self, rows: Indexes, other: Column, other_rows: Indexes) -> Mask:
        if isinstance(self.cells, np.ndarray) and isinstance(other.cells, np.ndarray):
            if self.cells.shape[1:] != other.cells.shape[1:]:
                return np.ones(len(rows), bool)
            unequal: Mask = self.cells[rows] != other.cells[other_rows]
            return np.asarray(unequal.any(axis=1)) if unequal.ndim == 2 else unequal
        mine, theirs = self.cells, other.cells
        pairs = zip(rows.tolist(), other_rows.tolist(), strict=True)
        if self.is_json:
            found = [not json_equal(mine[i], theirs[j]) for i, j in pairs]
        else:
            found = [mine[i] != theirs[j] for i, j in pairs]
        return np.array(found, bool)

    def digest_into(self, hasher: hashlib.blake2b, row: int) -> None:
        """Adds one cell, by value, to a digest."""
        if self.valid is not None and not self.valid[row]:
            hasher.update(b"\x00")
            return
        cell = self.cells[row]
        if self.is_json:
            try:
                data = json.dumps(json.loads(cell), sort_keys=True).encode()
            except ValueError:
                data = bytes(cell)
        elif isinstance(cell, str):
            data = cell.encode()
        else:
            data = bytes(cell) if isinstance(cell, bytes) else np.asarray(cell).tobytes()
        hasher.update(b"\x01" + len(data).to_bytes(8, "little") + data)


def column_of(field: schema_pb2.FieldData, rows: int) -> Column:
    """Raises ValueError when the field does not hold one cell per row."""
    kind = field.WhichOneof("field")
    valid = np.fromiter(field.valid_data, bool, len(field.valid_data)) if field.valid_data else None
    cells: NDArray[Any] | Sequence[Any]
    if kind == "vectors":
        payload = field.vectors.SerializeToString(deterministic=True)
        cells = _vector_cells(field.vectors, rows if valid is None else int(valid.sum()))
    elif kind == "scalars":
        payload = field.scalars.SerializeToString(deterministic=True)
        cells = _scalar_cells(field.scalars)
    elif kind == "struct_arrays":
        payload = field.struct_arrays.SerializeToString(deterministic=True)
        parts = [column_of(child, rows) for child in field.struct_arrays.fields]
        cells = [tuple(bytes(part.cells[row]) for part in parts) for row in range(rows)]
    else:
        payload, cells = b"", ()
    if valid is not None:
        payload += valid.tobytes()
        if len(valid) == rows and len(cells) != rows:
            cells = _spread(cells, valid)
    if len(cells) != rows:
        raise ValueError(f"field {field.field_name} holds {len(cells)} cells for {rows} rows")
    is_json = kind == "scalars" and field.scalars.WhichOneof("data") == "json_data"
    return Column(cells, valid, is_json, payload)


def _spread(cells: NDArray[Any] | Sequence[Any], valid: Mask) -> NDArray[Any] | Sequence[Any]:
    """Answers leave null cells out of vectors: give every row a place again."""
    if isinstance(cells, np.ndarray):
        spread = np.zeros((len(valid), *cells.shape[1:]), cells.dtype)
        spread[valid] = cells[: int(valid.sum())]
        return spread
    source = iter(cells)
    return [next(source, b"") if is_valid else b"" for is_valid in valid.tolist()]


def _packed(message: Any, dtype: str) -> NDArray[Any]:
    """The one packed fixed-width field of a message as an array, without a Python object per
    number."""
    wire = message.SerializeToString()
    start = 1
    while start < len(wire) and wire[start] & 0x80:
        start += 1
    return np.frombuffer(wire, dtype, offset=start + 1) if wire else np.empty(0, dtype)


def _scalar_cells(scalars: schema_pb2.ScalarField) -> NDArray[Any] | Sequence[Any]:
    kind = scalars.WhichOneof("data")
    if kind is None:
        return ()
    data = getattr(scalars, kind)
    if kind == "float_data":
        return _packed(data, "<u4")
    if kind == "double_data":
        return _packed(data, "<u8")
    if kind == "bool_data":
        return _packed(data, "u1")
    if kind == "array_data":
        return [_array_cell(cell) for cell in data.data]
    if len(data.data) and isinstance(data.data[0], int):
        return np.fromiter(data.data, np.int64, len(data.data))
    return list(data.data)


def _array_cell(cell: schema_pb2.ScalarField) -> bytes:
    kind = cell.WhichOneof("data")
    # An empty array may or may not name its element type.
    if kind is None or not getattr(cell, kind).data:
        return b""
    return bytes(cell.SerializeToString(deterministic=True))


def _vector_cells(vectors: schema_pb2.VectorField, rows: int) -> NDArray[Any] | Sequence[Any]:
    kind = vectors.WhichOneof("data")
    if kind is None or rows == 0:
        return ()
    if kind == "float_vector":
        words = _packed(vectors.float_vector, "<u4")
    elif kind == "sparse_float_vector":
        return list(vectors.sparse_float_vector.contents)
    elif kind == "vector_array":
        return [v.SerializeToString(deterministic=True) for v in vectors.vector_array.data]
    else:
        words = np.frombuffer(getattr(vectors, kind), np.uint8)
    if words.size % rows:
        raise ValueError(f"{kind} holds {words.size} words for {rows} rows")
    return words.reshape(rows, -1)
