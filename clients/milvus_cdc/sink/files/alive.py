"""Which of the published changes are rows that are still there: the last one of each key.

Laws: the later change counts, by place in the files. A key belongs to its partition: Milvus keeps
rows of one key in two partitions apart, and an upsert looks in its own. A delete that names no
partition takes the key in all of them, a dropped partition all rows before it. Memory is bounded:
keys are looked at in as many portions as it takes, every portion reading the key columns once, and
what remains is one bit (here: byte) per change.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from milvus_cdc.sink.files.manifest import Event
from milvus_cdc.sink.writer import SchemaChangeKind

if TYPE_CHECKING:
    from milvus_cdc.sink.files.reading import History, PublishedFile

Masks = dict[str, NDArray[np.bool_]]
"""By path of a file, a mark for each of its rows."""
MEMORY_BYTES = 512 * 2**20
_BYTES_PER_CHANGE = 100
"""Of a portion while it is sorted; texts come on top."""
_TEXT_BYTES = 100


def partition_drops(events: Sequence[tuple[int, Event]]) -> dict[str, int]:
    """Number of the manifest with the last drop of each partition."""
    return {
        event.partition: number
        for number, event in events
        if event.kind == SchemaChangeKind.DROP_PARTITION
    }


def masks(history: History, memory_bytes: int = MEMORY_BYTES) -> Masks:
    """By path of a file: which of its rows are there at the end."""
    text = pa.types.is_string(history.table.key.arrow_type)
    changes = sum(file.entry.rows for file in history.files)
    cost = changes * (_BYTES_PER_CHANGE + (_TEXT_BYTES if text else 0))
    portions = max(1, -(-cost // memory_bytes))
    found = {file.entry.path: np.zeros(file.entry.rows, np.bool_) for file in history.files}
    partitions: dict[str, int] = {"": 0}
    for portion in range(portions):
        _mark(history, portion, portions, partitions, found)
    return found


def _mark(
    history: History,
    portion: int,
    portions: int,
    partitions: dict[str, int],
    found: Masks,
) -> None:
    drops = partition_drops(history.events)
    parts = [_read(history, file, portion, portions, partitions, drops) for file in history.files]
    if not parts:
        return
    keys = pa.concat_arrays([part[0] for part in parts])
    codes = np.concatenate([part[1] for part in parts])
    deletes = np.concatenate([part[2] for part in parts])
    wins = winners(_numbers(keys), codes, deletes)
    begin = 0
    for file, part in zip(history.files, parts, strict=True):
        end = begin + len(part[3])
        found[file.entry.path][part[3][wins[begin:end]]] = True
        begin = end


def _read(
    history: History,
    file: PublishedFile,
    portion: int,
    portions: int,
    partitions: dict[str, int],
    drops: dict[str, int],
) -> tuple[pa.Array, NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """Keys, partition codes, deletes or not, and places of the changes that matter."""
    name = history.table.key.name
    read = history.open(file).read(columns=[name, "_op", "_ts", "_partition"]).combine_chunks()
    keep = np.ones(len(read), np.bool_)
    if file.entry.max_ts > history.at:
        keep &= read["_ts"].to_numpy() <= history.at
    keys = _one(read[name])
    if portions > 1:
        keep &= _portion_of(keys, portions) == portion
    named = _one(read["_partition"]).dictionary_encode()
    texts = named.dictionary.to_pylist()
    own = np.array([partitions.setdefault(text, len(partitions)) for text in texts], np.int32)
    codes = own[named.indices.to_numpy(zero_copy_only=False)] if texts else np.zeros(0, np.int32)
    gone = [code for text, code in partitions.items() if drops.get(text, 0) > file.number]
    if gone:
        keep &= ~np.isin(codes, gone)
    deletes = pc.equal(_one(read["_op"]), "DELETE").to_numpy(zero_copy_only=False)
    chosen = np.flatnonzero(keep)
    return keys.take(pa.array(chosen)), codes[chosen], deletes[chosen], chosen


def winners(
    keys: NDArray[np.int64], partitions: NDArray[np.int32], deletes: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which changes, in order, are rows that are there at the end; partition 0 is "none named"."""
    count = len(keys)
    wins = np.zeros(count, np.bool_)
    if not count:
        return wins
    order = np.lexsort((np.arange(count), partitions, keys))
    key, part = keys[order], partitions[order]
    new_key = np.concatenate(([True], key[1:] != key[:-1]))
    last = np.concatenate(((key[1:] != key[:-1]) | (part[1:] != part[:-1]), [True]))
    # The last delete of each key that names no partition, as a place in the order of changes.
    of_key = np.cumsum(new_key) - 1
    taken = np.full(of_key[-1] + 1, -1, np.int64)
    everywhere = deletes[order] & (part == 0)
    np.maximum.at(taken, of_key[everywhere], order[everywhere])
    there = last & ~deletes[order] & (order > taken[of_key])
    wins[order[there]] = True
    return wins


def _one(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _numbers(keys: pa.Array) -> NDArray[np.int64]:
    """Equal numbers for equal keys."""
    if pa.types.is_string(keys.type):
        keys = keys.dictionary_encode().indices
    return np.asarray(keys.to_numpy(zero_copy_only=False), np.int64)


def _portion_of(keys: pa.Array, portions: int) -> NDArray[np.int64]:
    if pa.types.is_string(keys.type):
        hashes = (zlib.crc32(key) for key in keys.cast(pa.binary()).to_pylist())
        return np.fromiter(hashes, np.int64, len(keys)) % portions
    numbers = keys.to_numpy(zero_copy_only=False).astype(np.uint64)
    # Fibonacci hashing: keys in steps of a power of two are spread as well.
    mixed = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return np.asarray(mixed % np.uint64(portions), np.int64)
