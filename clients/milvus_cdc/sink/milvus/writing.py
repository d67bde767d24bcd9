"""Row batches and deletes as requests, their columns never decoded.

An Insert and an Upsert request have the same field numbers and take columns as the log has them;
embedded messages and byte strings are the same on the wire, so `fields_data` goes out as slices. A
request stays below the server's limit of 64 MiB a message (`proxy.grpc.serverMaxRecvSize`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from milvuscdc.internal import milvus_log_pb2 as log_pb2

from milvus_cdc.codec.columns import concat, field_id, select_rows
from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import BugError, UserError
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, RowBatch, RowChunk
from milvus_cdc.sink.milvus.schema import FIRST_USER_FIELD_ID

REQUEST_BYTES_MAX = 60 * 1024 * 1024
DELETE_KEYS_MAX = 100_000
DELETE_BYTES_MAX = 8 * 1024 * 1024

_MSG_INSERT = 400
_MSG_UPSERT = 404


def row_requests(
    target: CollectionTarget, batch: RowBatch, mark_valid: frozenset[int]
) -> Iterator[Any]:
    """Usually one request; more when the chunks are too large together. `mark_valid`: field ids
    with a default value (see `codec.columns.concat`)."""
    part: list[RowChunk] = []
    size = 0
    for chunk in batch.chunks:
        chunk_size = sum(len(column) for column in chunk.columns)
        if chunk_size > REQUEST_BYTES_MAX:
            raise UserError(
                "ROW_BATCH_TOO_LARGE",
                f"one message of {target.database}.{target.collection} holds {chunk_size} bytes; the "
                "sink takes at most 64 MiB a request",
            )
        if part and size + chunk_size > REQUEST_BYTES_MAX:
            yield _rows(target, batch, part, mark_valid)
            part, size = [], 0
        part.append(chunk)
        size += chunk_size
    yield _rows(target, batch, part, mark_valid)


def _rows(
    target: CollectionTarget,
    batch: RowBatch,
    chunks: Sequence[RowChunk],
    mark_valid: frozenset[int],
) -> Any:
    columns = _by_field(target, chunks)
    return log_pb2.RowsRequest(
        base=log_pb2.WriteBase(msg_type=_MSG_INSERT if batch.op is Op.INSERT else _MSG_UPSERT),
        db_name=target.database,
        collection_name=target.collection,
        partition_name="" if target.partition_key else batch.partition,
        fields_data=[
            concat(parts, mark_valid=number in mark_valid) for number, parts in columns.items()
        ],
        num_rows=sum(chunk.rows_kept for chunk in chunks),
    )


def _by_field(target: CollectionTarget, chunks: Sequence[RowChunk]) -> dict[int, list[bytes]]:
    columns: dict[int, list[bytes]] = {}
    for chunk in chunks:
        for column in chunk.columns:
            number = field_id(column)
            if number < FIRST_USER_FIELD_ID:
                continue
            kept = column if chunk.keep is None else select_rows(column, chunk.keep)
            columns.setdefault(number, []).append(kept)
    if any(len(parts) != len(chunks) for parts in columns.values()):
        raise BugError(
            "COLUMNS_DIFFER",
            f"messages of {target.database}.{target.collection} do not hold the same columns",
        )
    return columns


def delete_expressions(target: CollectionTarget, batch: DeleteBatch) -> Iterator[str]:
    """`key in [...]`, in pieces a server takes; JSON strings are Milvus' string literals."""
    for keys in _pieces(batch.keys):
        if isinstance(keys, tuple):
            text = json.dumps(keys, ensure_ascii=False)
        else:
            text = str(keys.tolist())
        yield f"{target.key_field} in {text}"


def _pieces(keys: Keys) -> Iterator[Keys]:
    if not isinstance(keys, tuple):
        for start in range(0, len(keys), DELETE_KEYS_MAX):
            yield keys[start : start + DELETE_KEYS_MAX]
        return
    start = size = 0
    for index, key in enumerate(keys):
        size += 4 * len(key) + 4
        if size > DELETE_BYTES_MAX or index - start >= DELETE_KEYS_MAX:
            yield keys[start:index] if index > start else keys[start : index + 1]
            start = index if index > start else index + 1
            size = 4 * len(key) + 4
    if start < len(keys):
        yield keys[start:]
