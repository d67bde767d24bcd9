"""Columns of every type, cut and joined, against lists of Python values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.codec.columns import concat, field_id, key_values, num_rows, select_rows
from milvus_cdc.errors import BugError, CdcError
from pymilvus.grpc_gen import schema_pb2
from pymilvus.grpc_gen.schema_pb2 import DataType, FieldData

DIM = 16

Row = Any


@dataclass(frozen=True)
class Kind:
    """One field type: how rows are drawn, put into a FieldData and read back."""

    type: int
    rows: st.SearchStrategy[Row]
    put: Callable[[FieldData, Sequence[Row]], None]
    get: Callable[[FieldData], list[Row]]
    placeholder: Row = None
    """What the log holds for a null."""


def scalar(kind: int, rows: st.SearchStrategy[Row], data: str, placeholder: Row) -> Kind:
    return Kind(
        kind,
        rows,
        lambda f, values: getattr(f.scalars, data).data.extend(values),
        lambda f: list(getattr(f.scalars, data).data),
        placeholder,
    )


def packed(kind: int, name: str, width: int) -> Kind:
    def put(f: FieldData, values: Sequence[bytes]) -> None:
        f.vectors.dim = DIM
        setattr(f.vectors, name, b"".join(values))

    def get(f: FieldData) -> list[bytes]:
        assert f.vectors.dim == DIM
        data: bytes = getattr(f.vectors, name)
        return [data[i : i + width] for i in range(0, len(data), width)]

    return Kind(kind, st.binary(min_size=width, max_size=width), put, get)


def put_floats(f: FieldData, values: Sequence[tuple[float, ...]]) -> None:
    f.vectors.dim = DIM
    f.vectors.float_vector.data.extend(x for row in values for x in row)


def get_floats(f: FieldData) -> list[tuple[float, ...]]:
    data = f.vectors.float_vector.data
    return [tuple(data[i : i + DIM]) for i in range(0, len(data), DIM)]


def put_sparse(f: FieldData, values: Sequence[bytes]) -> None:
    dim = max((int.from_bytes(v[:4], "little") + 1 for v in values), default=0)
    f.vectors.dim = f.vectors.sparse_float_vector.dim = dim
    f.vectors.sparse_float_vector.contents.extend(values)


def get_sparse(f: FieldData) -> list[bytes]:
    sparse = f.vectors.sparse_float_vector
    for row in sparse.contents:
        assert int.from_bytes(row[:4], "little") < sparse.dim == f.vectors.dim
    return list(sparse.contents)


def put_array(f: FieldData, values: Sequence[tuple[int, ...]]) -> None:
    for value in values:
        row = schema_pb2.ScalarField()
        row.long_data.data.extend(value)
        f.scalars.array_data.data.append(row)
    f.scalars.array_data.element_type = DataType.Int64


def get_array(f: FieldData) -> list[tuple[int, ...]]:
    if f.scalars.array_data.data:
        assert f.scalars.array_data.element_type == DataType.Int64
    return [tuple(row.long_data.data) for row in f.scalars.array_data.data]


int64s = st.integers(-(2**63), 2**63 - 1)
float32s = st.floats(width=32, allow_nan=False)
SCALARS = {
    "bool": scalar(DataType.Bool, st.booleans(), "bool_data", False),
    "int32": scalar(DataType.Int32, st.integers(-(2**31), 2**31 - 1), "int_data", 0),
    "int64": scalar(DataType.Int64, int64s, "long_data", 0),
    "float": scalar(DataType.Float, float32s, "float_data", 0.0),
    "double": scalar(DataType.Double, st.floats(allow_nan=False), "double_data", 0.0),
    "varchar": scalar(DataType.VarChar, st.text(max_size=200), "string_data", ""),
    "json": scalar(DataType.JSON, st.binary(max_size=9), "json_data", b""),
    "timestamptz": scalar(DataType.Timestamptz, int64s, "timestamptz_data", 0),
    "array": Kind(
        DataType.Array, st.lists(int64s, max_size=3).map(tuple), put_array, get_array, ()
    ),
}
FLOATS = st.tuples(float32s, float32s).map(lambda ab: (ab[0],) + (ab[1],) * (DIM - 1))
KINDS = SCALARS | {
    "float_vector": Kind(DataType.FloatVector, FLOATS, put_floats, get_floats),
    "binary_vector": packed(DataType.BinaryVector, "binary_vector", DIM // 8),
    "float16_vector": packed(DataType.Float16Vector, "float16_vector", DIM * 2),
    "bfloat16_vector": packed(DataType.BFloat16Vector, "bfloat16_vector", DIM * 2),
    "int8_vector": packed(DataType.Int8Vector, "int8_vector", DIM),
    "sparse": Kind(
        DataType.SparseFloatVector,
        st.tuples(st.integers(0, 2**31), st.binary(min_size=4, max_size=4)).map(
            lambda pair: pair[0].to_bytes(4, "little") + pair[1]
        ),
        put_sparse,
        get_sparse,
    ),
}


def build(kind: Kind, rows: Sequence[Row], *, nullable: bool = False, full: bool = True) -> bytes:
    """A column as the log holds it; not `full`: without placeholders for nulls."""
    f = FieldData(type=kind.type, field_name="fäld", field_id=2**40, is_dynamic=True)
    if nullable:
        f.valid_data.extend(row is not None for row in rows)
        if full:
            rows = [kind.placeholder if row is None else row for row in rows]
        else:
            rows = [row for row in rows if row is not None]
    kind.put(f, rows)
    column: bytes = f.SerializeToString()
    return column


def rows_of(kind: Kind, column: bytes) -> list[Row]:
    """Rows of a column in the form of a request."""
    f = FieldData.FromString(column)
    assert (f.type, f.field_name, f.field_id, f.is_dynamic) == (kind.type, "fäld", 2**40, True)
    values = kind.get(f)
    if not f.valid_data:
        return values
    assert len(values) == sum(f.valid_data)
    remaining = iter(values)
    return [next(remaining) if valid else None for valid in f.valid_data]


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_join_and_cut_are_exact(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    chunks = data.draw(st.lists(st.lists(kind.rows, max_size=5), min_size=1, max_size=4))
    rows = [row for chunk in chunks for row in chunk]
    joined = concat([build(kind, chunk) for chunk in chunks])
    assert rows_of(kind, joined) == rows
    assert num_rows(joined) == len(rows)
    keep = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)))) if rows else []
    cut = select_rows(joined, keep)
    assert rows_of(kind, cut) == [rows[i] for i in keep]
    assert rows_of(kind, concat([cut, joined])) == [rows[i] for i in keep] + rows
    marked = FieldData.FromString(concat([joined, cut], mark_valid=True))
    assert list(marked.valid_data) == [True] * (len(rows) + len(keep))


@pytest.mark.parametrize("name", SCALARS)
@given(data=st.data())
def test_nullable_columns_lose_their_placeholders(name: str, data: st.DataObject) -> None:
    kind = SCALARS[name]
    maybe = st.none() | kind.rows
    chunks = data.draw(st.lists(st.lists(maybe, max_size=5), min_size=1, max_size=4))
    rows = [row for chunk in chunks for row in chunk]
    columns = [build(kind, chunk, nullable=True, full=data.draw(st.booleans())) for chunk in chunks]
    joined = concat(columns)
    assert rows_of(kind, joined) == rows
    assert num_rows(joined) == len(rows)
    keep = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)))) if rows else []
    assert rows_of(kind, select_rows(joined, keep)) == [rows[i] for i in keep]
    one = columns[0]
    keep = [i for i in keep if i < len(chunks[0])]
    assert rows_of(kind, select_rows(one, keep)) == [chunks[0][i] for i in keep]


def test_nan_and_minus_zero_keep_their_bits() -> None:
    values = np.array([0x7FC00001, 0xFFC00123, 0x80000000], np.uint32)
    f = FieldData(type=DataType.Float, field_id=1)
    raw = b"\x0a\x0c" + values.tobytes()
    column = f.SerializeToString() + b"\x1a\x10" + b"\x22\x0e" + raw
    assert values.tobytes() in concat([column])
    assert values[1:].tobytes() in select_rows(column, [1, 2])


@given(st.lists(int64s))
def test_integer_keys(keys: list[int]) -> None:
    column = build(SCALARS["int64"], keys)
    values = key_values(column)
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.int64
    assert values.tolist() == keys


def test_text_keys_and_field_id() -> None:
    column = build(SCALARS["varchar"], ["a", "", "ü"])
    assert key_values(column) == ("a", "", "ü")
    assert field_id(column) == 2**40
    assert field_id(concat([column, column])) == 2**40


def test_a_key_column_of_another_type_is_refused() -> None:
    with pytest.raises(BugError, match="primary key"):
        key_values(build(SCALARS["double"], [1.0]))
    with pytest.raises(BugError, match="primary key"):
        key_values(build(KINDS["binary_vector"], [b"ab"]))


def test_what_would_mix_rows_up_is_refused() -> None:
    ids = build(SCALARS["int64"], [1])
    other = FieldData.FromString(ids)
    other.field_id = 7
    wide = FieldData(type=DataType.FloatVector, field_id=2**40)
    wide.vectors.dim = 2 * DIM
    wide.vectors.float_vector.data.extend([0.0] * 2 * DIM)
    for columns in (
        [ids, other.SerializeToString()],
        [ids, build(SCALARS["int32"], [1])],
        [build(KINDS["float_vector"], [(0.0,) * DIM]), wide.SerializeToString()],
    ):
        with pytest.raises(BugError, match="MIXED_COLUMNS"):
            concat(columns)
    with pytest.raises(BugError, match="ROW_OUT_OF_RANGE"):
        select_rows(ids, [1])
    with pytest.raises(BugError, match="ROW_OUT_OF_RANGE"):
        select_rows(build(SCALARS["int64"], [1, None], nullable=True), [2])


def test_types_of_later_versions_are_refused_not_guessed() -> None:
    struct = FieldData(type=DataType.ArrayOfStruct, field_id=1)
    struct.struct_arrays.fields.add(field_id=2)
    vectors = FieldData(type=DataType.ArrayOfVector, field_id=1)
    vectors.vectors.vector_array.dim = 2
    for column in (struct, vectors):
        with pytest.raises(BugError, match="UNSUPPORTED_COLUMN"):
            concat([column.SerializeToString()])


def test_numbers_that_are_not_packed_are_read_all_the_same() -> None:
    unpacked = bytes.fromhex("080528641a06") + b"\x1a\x04" + b"\x08\x05\x08\x07"
    assert key_values(unpacked).tolist() == [5, 7]  # type: ignore[union-attr]
    assert key_values(concat([unpacked, unpacked])).tolist() == [5, 7, 5, 7]  # type: ignore[union-attr]
    assert key_values(select_rows(unpacked, [1])).tolist() == [7]  # type: ignore[union-attr]


@given(st.data())
def test_a_damaged_column_raises_ours_or_gives_a_column(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    whole = bytearray(build(KINDS[name], data.draw(st.lists(KINDS[name].rows, max_size=3))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    column = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for work in (
        field_id,
        key_values,
        num_rows,
        lambda c: concat([c, c]),
        lambda c: select_rows(c, [0]),
    ):
        try:
            work(column)
        except CdcError:
            pass
