"""Row batches as serialized requests, cut to a size the server takes. Pure.

Laws: a column's bytes are never decoded into values; columns are matched by field id, since their
order may differ between messages; every row and key of a batch is in exactly one request. Facts:
2.3.5 takes messages up to 64 MiB, deletes of a million keys (11 MB) in one request; `hash_keys` are
not needed (reference runs against real servers).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from milvuscdc.internal import milvus_log_pb2 as log_pb2

from milvus_cdc.codec.columns import concat, field_id, key_values, select_rows
from milvus_cdc.codec.messages import Keys
from milvus_cdc.codec.wire import delimited
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2, schema_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.sink.milvus import schema as schemas

REQUEST_BYTES_MAX = 60 * 2**20
DELETE_KEYS_MAX = 100_000
DELETE_BYTES_MAX = 8 * 2**20

_FIELDS_DATA = 5
_IS_DYNAMIC = b"\x30\x01"
"""`is_dynamic: true` of a FieldData. The log of 2.2 leaves it out (seen on 2.2.16), and without it
a later Milvus takes the column for one that it must add itself.
"""
_INT64_MIN = -(2**63)
_MSG_TYPES = {
    Op.INSERT: int(common_pb2.MsgType.Insert),
    Op.UPSERT: int(common_pb2.MsgType.Upsert),
}
_METHODS = {Op.INSERT: "Insert", Op.UPSERT: "Upsert"}


@dataclass(frozen=True, slots=True)
class MilvusTarget(CollectionTarget):
    """A target with what the sink must know of its fields."""

    key_id: int = 0
    rewritten: frozenset[int] = frozenset()
    """Nullable fields and those with a default: their request form differs from the log's."""
    defaulted: frozenset[int] = frozenset()
    """Fields with a default value: a request must call each of their rows valid or null."""
    dynamic: frozenset[int] = frozenset()
    """The field that holds what the schema does not name."""
    computed: frozenset[int] = frozenset()
    """Outputs of functions: the sink computes them and refuses to be given them."""


def target_of(want: Collection) -> MilvusTarget:
    """Raises BugError when the schema has no primary key."""
    schema = schemas.parse(want)
    defaulted = frozenset(f.fieldID for f in schema.fields if f.HasField("default_value"))
    return MilvusTarget(
        database=want.database,
        collection=want.name,
        key_field=schemas.key_field(schema).name,
        key_id=schemas.key_field(schema).fieldID,
        partition_key=schemas.has_partition_key(schema),
        rewritten=defaulted | frozenset(f.fieldID for f in schema.fields if f.nullable),
        defaulted=defaulted,
        dynamic=frozenset(f.fieldID for f in schema.fields if f.is_dynamic),
        computed=frozenset(f.fieldID for f in schema.fields if f.is_function_output),
    )


def method(batch: RowBatch | DeleteBatch) -> str:
    return "Delete" if isinstance(batch, DeleteBatch) else _METHODS[batch.op]


def rows_request(target: MilvusTarget, batch: RowBatch) -> bytes:
    """A serialized milvus.InsertRequest or UpsertRequest."""
    head = log_pb2.RowsRequest(
        base=log_pb2.WriteBase(msg_type=_MSG_TYPES[batch.op]),
        db_name=target.database,
        collection_name=target.collection,
        partition_name="" if target.partition_key else batch.partition,
        num_rows=batch.num_rows,
    )
    # Joined once, here: a message object would copy every column twice more.
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for column in _columns(target, batch.chunks):
        parts += delimited(_FIELDS_DATA, column)
    return b"".join(parts)


def request_size(batch: RowBatch) -> int:
    """About the bytes of its request; rows left out count in proportion."""
    return sum(
        sum(map(len, chunk.columns)) * chunk.rows_kept // max(1, chunk.num_rows)
        for chunk in batch.chunks
    )


def split_rows(batch: RowBatch, bytes_max: int) -> list[RowBatch]:
    """The same rows in the same order, in batches of about `bytes_max` (one row may exceed it)."""
    rows, size = batch.num_rows, request_size(batch)
    if size <= bytes_max or rows <= 1:
        return [batch]
    first, second = _halves(batch, rows // 2)
    return split_rows(first, bytes_max) + split_rows(second, bytes_max)


def halve_rows(batch: RowBatch) -> list[RowBatch]:
    """Two batches, or the one when it has a single row."""
    rows = batch.num_rows
    return [batch] if rows <= 1 else list(_halves(batch, rows // 2))


def keys_of(target: MilvusTarget, batch: RowBatch) -> Keys:
    """The primary keys of its rows, in order."""
    keys = []
    for chunk in batch.chunks:
        column = next((each for each in chunk.columns if field_id(each) == target.key_id), None)
        if column is None:
            raise _columns_differ(target, target.key_id)
        keys.append(column if chunk.keep is None else select_rows(column, chunk.keep))
    return key_values(concat(keys))


def any_key(want: Collection) -> str:
    """An expression that every row fulfils."""
    key = schemas.key_field(schemas.parse(want))
    if key.data_type == schema_pb2.VarChar:
        return f'{key.name} >= ""'
    return f"{key.name} <= {2**63 - 1}"


def delete_requests(
    target: MilvusTarget, batch: DeleteBatch, *, sums: bool = True
) -> Iterator[bytes]:
    """Serialized milvus.DeleteRequest, each below the limits; `sums`: its expressions have them."""
    for expr in keys_in(target, batch.keys, sums=sums):
        request = milvus_pb2.DeleteRequest(
            base=common_pb2.MsgBase(msg_type=common_pb2.MsgType.Delete),
            db_name=target.database,
            collection_name=target.collection,
            partition_name="" if target.partition_key else batch.partition,
            expr=expr,
        )
        yield request.SerializeToString()


def keys_in(target: CollectionTarget, keys: Keys, *, sums: bool = True) -> Iterator[str]:
    """Expressions that together hold for exactly these keys, each below the limits."""
    for values in _key_runs(keys, sums):
        yield f"{target.key_field} in [{','.join(values)}]"


def _key_runs(keys: Keys, sums: bool) -> Iterator[list[str]]:
    # JSON's escapes are the expression grammar's; without ASCII escaping the keys stay exact.
    literals = (
        (json.dumps(key, ensure_ascii=False) for key in keys)
        if isinstance(keys, tuple)
        else map(_integer if sums else str, keys.tolist())
    )
    run: list[str] = []
    size = 0
    for literal in literals:
        cost = len(literal) if literal.isascii() else len(literal.encode())
        if run and (len(run) >= DELETE_KEYS_MAX or size + cost > DELETE_BYTES_MAX):
            yield run
            run, size = [], 0
        run.append(literal)
        size += cost + 1
    if run:
        yield run


def _integer(key: int) -> str:
    # The grammar reads the sign apart from the digits, and these digits alone are too large
    # (2.3.5: "failed to create expr plan"); a sum of constants is folded.
    return str(key) if key != _INT64_MIN else f"{_INT64_MIN + 1} - 1"


def _halves(batch: RowBatch, first_rows: int) -> tuple[RowBatch, RowBatch]:
    first: list[RowChunk] = []
    second: list[RowChunk] = []
    left = first_rows
    for chunk in batch.chunks:
        kept = chunk.rows_kept
        if left >= kept:
            first.append(chunk)
        elif left <= 0:
            second.append(chunk)
        else:
            keep = chunk.keep if chunk.keep is not None else tuple(range(chunk.num_rows))
            first.append(replace(chunk, keep=keep[:left]))
            second.append(replace(chunk, keep=keep[left:]))
        left -= kept
    return replace(batch, chunks=tuple(first)), replace(batch, chunks=tuple(second))


def _columns(target: MilvusTarget, chunks: tuple[RowChunk, ...]) -> Iterator[bytes]:
    chunks = tuple(chunk for chunk in chunks if chunk.rows_kept)
    by_field: dict[int, list[bytes]] = {}
    for index, chunk in enumerate(chunks):
        keep = chunk.keep
        if keep is not None and len(keep) == chunk.num_rows:
            keep = None
        for column in chunk.columns:
            number = field_id(column)
            if number < schemas.FIRST_USER_FIELD_ID or number in target.computed:
                continue
            parts = by_field.setdefault(number, [])
            if len(parts) != index:
                raise _columns_differ(target, number)
            parts.append(column if keep is None else select_rows(column, keep))
    for number, parts in by_field.items():
        if len(parts) != len(chunks):
            raise _columns_differ(target, number)
        if len(parts) == 1 and number not in target.rewritten:
            joined = parts[0]
        else:
            joined = concat(parts, mark_valid=number in target.defaulted)
        yield joined + _IS_DYNAMIC if number in target.dynamic else joined


def _columns_differ(target: MilvusTarget, number: int) -> BugError:
    return BugError(
        "COLUMNS_DIFFER",
        f"{target.database}.{target.collection}: field {number} is not exactly once in every one "
        "of the messages to be written together",
    )
