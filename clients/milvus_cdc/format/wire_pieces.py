"""Pieces that Avro's and Protobuf's encodings share: varints, lengths, little-endian numbers.

Facts: both write integers as base-128 varints of up to 64 bits, least significant group first, and
signed ones either as zigzag (Avro) or as two's complement (Protobuf int32, int64); floats and
doubles as IEEE 754, little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.errors import BugError
from milvus_cdc.format import Record, assemble, json_cells
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table

Frames = tuple[bytes, bytes]
"""How keys and values begin: which schema they are written in."""

_FEW = 32
"""So few numbers are encoded sooner one by one."""


def varint(value: int) -> bytes:
    """Of a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varints(values: NDArray[np.uint64]) -> tuple[bytes, NDArray[np.int64]]:
    """All of them one after the other, and where each begins and ends (one more than values)."""
    ends = np.zeros(len(values) + 1, np.int64)
    if not len(values):
        return b"", ends
    width = max(1, -(-int(values.max()).bit_length() // 7))
    lengths = np.ones(len(values), np.int64)
    for count in range(1, width):
        lengths += values >= np.uint64(1 << 7 * count)
    groups = np.empty((len(values), width), np.uint8)
    for at in range(width):
        groups[:, at] = (values >> np.uint64(7 * at)) & np.uint64(0x7F) | np.uint64(0x80)
    rows = np.arange(len(values))
    groups[rows, lengths - 1] &= 0x7F
    np.cumsum(lengths, out=ends[1:])
    flat = groups[np.arange(width) < lengths[:, None]]
    return flat.tobytes(), ends


def varint_pieces(values: NDArray[np.uint64]) -> list[bytes]:
    """Each on its own."""
    if len(values) <= _FEW:
        return [varint(value) for value in values.tolist()]
    flat, ends = varints(values)
    return assemble.slices(flat, ends)


def zigzag(values: NDArray[Any]) -> NDArray[np.uint64]:
    wide = values.astype(np.int64)
    return ((wide << 1) ^ (wide >> 63)).view(np.uint64)


def twos_complement(values: NDArray[Any]) -> NDArray[np.uint64]:
    return values.astype(np.int64).view(np.uint64)


_SHORT = [varint(length) for length in range(4096)]
_SHORT_ZIGZAG = [varint(2 * length) for length in range(4096)]


def prefixed(pieces: list[bytes]) -> list[bytes]:
    """Each with its length before it, as Protobuf has it."""
    return [(_SHORT[len(p)] if len(p) < 4096 else varint(len(p))) + p for p in pieces]


def prefixed_zigzag(pieces: list[bytes]) -> list[bytes]:
    """Each with its length before it, as Avro has it."""
    return [(_SHORT_ZIGZAG[len(p)] if len(p) < 4096 else varint(2 * len(p))) + p for p in pieces]


def scalars(
    kind: FieldType,
    column: pa.Array,
    with_length: Callable[[list[bytes]], list[bytes]],
    unsigned: Callable[[NDArray[Any]], NDArray[np.uint64]],
) -> list[bytes]:
    """Cells of one value each, integers as varints of what `unsigned` makes of them."""
    match kind:
        case FieldType.VARCHAR:
            return with_length([text or b"" for text in json_cells.texts(column)])
        case FieldType.JSON:
            texts = json_cells.texts(column)
            return with_length([json_cells.json_text(text)[0] if text else b"" for text in texts])
        case FieldType.BOOL:
            return [b"\x01" if value else b"\x00" for value in assemble.numbers(column)]
        case FieldType.FLOAT | FieldType.DOUBLE:
            values = assemble.numbers(column)
            return assemble.fixed(values.tobytes(), values.itemsize)
    return varint_pieces(unsigned(assemble.numbers(column)))


def floats(field: Field, column: pa.Array) -> bytes:
    """Float32 of vectors of any float type, one after the other."""
    if field.type is FieldType.BFLOAT16_VECTOR:
        return assemble.bfloat16(assemble.fixed_bytes(column), field.dim).tobytes()
    return assemble.numbers(column).astype(np.float32, copy=False).tobytes()


def prepared(frames: dict[Table, Frames], table: Table) -> Frames:
    """Raises BugError NOT_PREPARED for a table whose schemas were not registered before."""
    if table not in frames:
        raise BugError("NOT_PREPARED", f"no schema has been registered for {table.full_name}")
    return frames[table]


def records(
    table: Table,
    changes: Changes,
    frames: Frames,
    parts: Callable[[Field, pa.Array], Sequence[assemble.Part]],
) -> list[Record]:
    """One of each row; a delete is a key without a value."""
    key_frame, value_frame = frames
    found: list[Record] = []
    for batch in assemble.chunks(changes.arrow(table)):
        key_parts = parts(table.key, batch.column(table.key.name))
        keys = assemble.join_rows([key_frame, *key_parts])
        if changes.op is ChangeOp.DELETE:
            found += [Record(key, None) for key in keys]
            continue
        row_parts: list[assemble.Part] = [value_frame]
        for field, column in zip(table.fields, batch.columns, strict=True):
            row_parts += parts(field, column)
        found += map(Record, keys, assemble.join_rows(row_parts))
    return found
