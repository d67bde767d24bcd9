"""Arrow to a column and back is what it was, for every type; also through slices."""

from __future__ import annotations

import pyarrow as pa
import pytest
from milvus_cdc.codec import arrow
from milvus_cdc.codec.columns import concat
from milvus_cdc.codec.field_data import field_data
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.rows import ChangeOp, Field

from tests.unit.format import tables

TABLE = tables.every_type(nullable=True)


def rows(count: int) -> pa.RecordBatch:
    nullable = [field.name for field in TABLE.fields if field.nullable]
    made = [
        tables.row(at) | dict.fromkeys(nullable[at % 4 :: 4] if at % 3 else [])
        for at in range(count)
    ]
    return tables.changes(TABLE, made, ChangeOp.CREATE).arrow(TABLE)


def encoded(field: Field, values: pa.Array) -> bytes:
    return field_data(
        values,
        name=field.name,
        field_id=field.field_id,
        milvus_type=field.type.value,
        dim=field.dim,
        element_type=field.element_type.value if field.element_type else "",
        nullable=field.nullable,
        dynamic=field.dynamic,
    )


@pytest.mark.parametrize("field", TABLE.fields, ids=lambda field: field.name)
def test_back_and_forth(field: Field) -> None:
    values = rows(20).column(field.name)
    for each in (values, values.slice(3, 9), values.slice(19), values.slice(4, 1)):
        column = encoded(field, each)
        assert arrow.decode(column, field.arrow_type, len(each)).equals(each)
        # As a request takes it: joined with others, values of rows that are there only.
        joined = concat([column, encoded(field, values)])
        assert arrow.decode(joined, field.arrow_type, len(each) + 20).equals(
            pa.concat_arrays([each, values])
        )
        parsed = schema_pb2.FieldData.FromString(column)
        assert (parsed.field_name, parsed.field_id) == (field.name, field.field_id)
        assert parsed.is_dynamic == field.dynamic
        assert len(parsed.valid_data) == (len(each) if field.nullable else 0)


def test_an_unknown_type() -> None:
    with pytest.raises(BugError, match="UNSUPPORTED_TYPE"):
        field_data(pa.array([1]), name="x", field_id=100, milvus_type="Geometry")
