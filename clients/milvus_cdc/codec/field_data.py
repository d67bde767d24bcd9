"""Arrow arrays as serialized schema.FieldData: the way back from `codec.arrow`.

Laws: values keep their bits; a null is marked in `valid_data` and has no value, as a write request
takes it. Vectors are copied as whole buffers; scalars cost one Python object each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from milvus_cdc.codec.wire import delimited, encode_varint
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2

_VECTORS = 4
_DIM = 1
_PACKED = {"FloatVector": 2}
_BYTES = {"BinaryVector": 3, "Float16Vector": 4, "BFloat16Vector": 5, "Int8Vector": 7}
_SCALARS = {
    "Bool": "bool_data",
    "Int8": "int_data",
    "Int16": "int_data",
    "Int32": "int_data",
    "Int64": "long_data",
    "Float": "float_data",
    "Double": "double_data",
    "VarChar": "string_data",
}


def field_data(
    values: pa.Array,
    *,
    name: str,
    field_id: int,
    milvus_type: str,
    dim: int = 0,
    element_type: str = "",
    nullable: bool = False,
    dynamic: bool = False,
) -> bytes:
    """One column. Raises BugError for a type not known here."""
    head = schema_pb2.FieldData(
        type=schema_pb2.DataType.Value(milvus_type),
        field_name=name,
        field_id=field_id,
        is_dynamic=dynamic,
    )
    if nullable:
        head.valid_data.extend(values.is_valid().to_pylist())
    present = values.drop_null() if values.null_count else values
    if milvus_type == "SparseFloatVector":
        _sparse(head, present)
    elif milvus_type in _SCALARS:
        _fill(getattr(head.scalars, _SCALARS[milvus_type]), present)
    elif milvus_type == "JSON":
        head.scalars.json_data.data.extend(present.cast(pa.binary()).to_pylist())
    elif milvus_type == "Array":
        _arrays(head, present, element_type)
    elif milvus_type in _PACKED or milvus_type in _BYTES:
        data: list[bytes | memoryview] = [_raw(present)]
        if milvus_type in _PACKED:
            data = delimited(_PACKED[milvus_type], *delimited(1, *data))
        else:
            data = delimited(_BYTES[milvus_type], *data)
        dimension = encode_varint(_DIM << 3) + encode_varint(dim)
        return b"".join([head.SerializeToString(), *delimited(_VECTORS, dimension, *data)])
    else:
        raise BugError("UNSUPPORTED_TYPE", f"fields of type {milvus_type} are not known here")
    return bytes(head.SerializeToString())


def _fill(part: Any, values: pa.Array) -> None:
    part.data.extend(values.to_pylist())
    # A column of no values is still of its type.
    part.SetInParent()


def _raw(values: pa.Array) -> bytes | memoryview:
    """The bytes of fixed-size values without nulls."""
    if pa.types.is_fixed_size_list(values.type):
        return bytes(values.flatten().to_numpy().tobytes())
    width = values.type.byte_width
    begin, end = values.offset * width, (values.offset + len(values)) * width
    return memoryview(values.buffers()[1]).cast("B")[begin:end]


def _sparse(head: Any, values: pa.Array) -> None:
    contents = []
    dim = 0
    for row in values:
        pairs = np.empty(len(row.values), np.dtype([("index", "<u4"), ("value", "<f4")]))
        pairs["index"] = row.values.field("index").to_numpy()
        pairs["value"] = row.values.field("value").to_numpy()
        dim = max(dim, int(pairs["index"].max(initial=0)) + 1)
        contents.append(pairs.tobytes())
    head.vectors.dim = dim
    head.vectors.sparse_float_vector.dim = dim
    head.vectors.sparse_float_vector.contents.extend(contents)


def _arrays(head: Any, values: pa.Array, element_type: str) -> None:
    target = head.scalars.array_data
    target.element_type = schema_pb2.DataType.Value(element_type)
    part = _SCALARS[element_type]
    for row in values.to_pylist():
        cell = getattr(target.data.add(), part)
        cell.data.extend(row)
        cell.SetInParent()
