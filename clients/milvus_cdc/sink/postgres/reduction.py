"""What a batch comes to: which of its rows are there in the end, and which keys are to go.

Laws: the last change of a key counts; a delete that names a partition removes a row of that
partition only, be it in the batch or in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.postgres.columns import PARTITION_COLUMN, TS_COLUMN


@dataclass(frozen=True)
class Reduced:
    """`rows` have the fields of the table, then partition and timestamp; each key once."""

    rows: pa.RecordBatch
    fresh: bool
    """All of them came as inserts and no key occurred twice: likely none is in the table."""
    deletes: dict[str, pa.Array] = field(default_factory=dict)
    """Keys without a row in the batch, by partition; an empty one means all."""


def reduce(table: Table, changes: Sequence[Changes]) -> Reduced:
    """CPU work of the size of the batch: belongs in a thread."""
    changes = [each for each in changes if each.num_rows]
    batches = [each.arrow(table) for each in changes]
    keys = _keys(table, batches)
    sizes = np.array([each.num_rows for each in changes], np.int64)
    change_of = np.repeat(np.arange(len(changes)), sizes)
    # Of each distinct key a number; assigning in order leaves the last position of each.
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    distinct = len(encoded.dictionary)
    repeats = distinct < len(keys)
    removes = np.array([each.op is ChangeOp.DELETE for each in changes], bool)
    if repeats and _partitions_matter(changes):
        kept, gone = _walk(changes, codes, change_of)
    else:
        last = np.empty(distinct, np.int64)
        last[codes] = np.arange(len(keys))
        last.sort()
        is_delete = removes[change_of[last]]
        kept = last[~is_delete]
        gone = _by_partition(changes, change_of, last[is_delete])
    creates = np.array([each.op is ChangeOp.CREATE for each in changes], bool)
    return Reduced(
        rows=_rows(table, changes, batches, kept, change_of),
        fresh=not repeats and bool(creates[change_of[kept]].all()),
        deletes={partition: keys.take(pa.array(at)) for partition, at in gone.items()},
    )


def _keys(table: Table, batches: Sequence[pa.RecordBatch]) -> pa.Array:
    if not batches:
        return pa.array([], table.key.arrow_type)
    return pa.concat_arrays([each.column(table.key.name) for each in batches])


def _partitions_matter(changes: Sequence[Changes]) -> bool:
    """Whether a delete may not concern what came before it of the same key."""
    return any(each.op is ChangeOp.DELETE and each.partition for each in changes)


def _by_partition(
    changes: Sequence[Changes], change_of: NDArray[np.int64], positions: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    found: dict[str, list[NDArray[np.int64]]] = {}
    owners = change_of[positions]
    for at in np.unique(owners):
        found.setdefault(changes[at].partition, []).append(positions[owners == at])
    return {partition: np.concatenate(parts) for partition, parts in found.items()}


def _walk(
    changes: Sequence[Changes], codes: NDArray[np.int64], change_of: NDArray[np.int64]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Change by change; for batches in which a key repeats and partitions matter."""
    rows: dict[int, int] = {}
    gone: dict[tuple[int, str], int] = {}
    for position, (code, at) in enumerate(zip(codes.tolist(), change_of.tolist(), strict=True)):
        change = changes[at]
        if change.op is not ChangeOp.DELETE:
            rows[code] = position
            continue
        if code not in rows:
            gone[code, change.partition] = position
        elif change.partition in ("", changes[change_of[rows[code]]].partition):
            # It had taken the place of whatever the table holds of this key.
            del rows[code]
            gone[code, ""] = position
    by_partition: dict[str, list[int]] = {}
    for (code, partition), position in gone.items():
        if code not in rows:
            by_partition.setdefault(partition, []).append(position)
    kept = np.array(sorted(rows.values()), np.int64)
    return kept, {name: np.array(at, np.int64) for name, at in by_partition.items()}


def _rows(
    table: Table,
    changes: Sequence[Changes],
    batches: Sequence[pa.RecordBatch],
    kept: NDArray[np.int64],
    change_of: NDArray[np.int64],
) -> pa.RecordBatch:
    brought = [at for at, each in enumerate(changes) if each.op is not ChangeOp.DELETE]
    schema = table.arrow_schema
    whole = pa.Table.from_batches([batches[at] for at in brought], schema).combine_chunks()
    # Positions among all changes, as positions among those that bring rows.
    sizes = np.array([each.num_rows for each in changes], np.int64)
    sizes[[at for at, each in enumerate(changes) if each.op is ChangeOp.DELETE]] = 0
    begins = np.cumsum([each.num_rows for each in changes]) - [each.num_rows for each in changes]
    moved = np.cumsum(sizes) - sizes
    owners = change_of[kept]
    places = kept - begins[owners] + moved[owners] if len(kept) else kept
    if len(places) != whole.num_rows:
        whole = whole.take(pa.array(places)).combine_chunks()
    partitions = pa.array([each.partition for each in changes], pa.string())
    stamps = pa.array([each.ts for each in changes], pa.int64())
    columns = [
        chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type)
        for chunked in whole.columns
    ]
    columns += [partitions.take(pa.array(owners)), stamps.take(pa.array(owners))]
    ours = [pa.field(PARTITION_COLUMN, pa.string()), pa.field(TS_COLUMN, pa.int64())]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema([*schema, *ours]))
