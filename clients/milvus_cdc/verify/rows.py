"""A page of rows and the comparison of two pages: pure functions on columns.

Keys of a page are ascending and distinct (Milvus' query gives one row of a doubled key).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from milvus_cdc.verify.columns import Column, Indexes, column_of
from milvus_cdc.verify.keys import Key, KeyField

if TYPE_CHECKING:
    from pymilvus.grpc_gen import milvus_pb2, schema_pb2
else:
    from milvus_cdc.milvus_protos import milvus_pb2, schema_pb2

KeyColumn = NDArray[np.int64] | list[str]


@dataclass(frozen=True, slots=True)
class Rows:
    keys: KeyColumn
    columns: Mapping[str, Column]
    order: Indexes | None = None
    """Where row i of `keys` lies in the columns; None when it is row i."""
    size: int = 0
    """Bytes of the answer they came in."""

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> Key:
        found = self.keys[row]
        return found if isinstance(found, str) else int(found)

    def places(self, rows: Indexes) -> Indexes:
        return rows if self.order is None else self.order[rows]

    def upto(self, bound: Key) -> Rows:
        """The rows whose keys are not above `bound`."""
        if not len(self) or self.key(len(self) - 1) <= bound:  # type: ignore[operator]
            return self
        if isinstance(self.keys, list):
            count = sum(1 for key in self.keys if key <= cast("str", bound))
        else:
            count = int(np.searchsorted(self.keys, cast("int", bound), side="right"))
        order = self.order if self.order is not None else np.arange(len(self))
        return Rows(self.keys[:count], self.columns, order[:count], self.size)

    def digest(self, row: int) -> bytes:
        """A short name of everything but the key that the row holds, by value."""
        hasher = hashlib.blake2b(digest_size=16)
        place = int(self.places(np.array([row]))[0])
        for name in sorted(self.columns):
            self.columns[name].digest_into(hasher, place)
        return hasher.digest()


def rows_of(answer: milvus_pb2.QueryResults, key: KeyField) -> Rows:
    """Raises ValueError when the answer lacks the key or is not rectangular."""
    by_name: dict[str, schema_pb2.FieldData] = {f.field_name: f for f in answer.fields_data}
    if not by_name:
        return Rows([] if key.is_string else np.empty(0, np.int64), {})
    scalars = by_name[key.name].scalars
    keys: KeyColumn
    order: Indexes | None = None
    if key.is_string:
        keys = list(scalars.string_data.data)
        count = len(keys)
        if any(a >= b for a, b in itertools.pairwise(keys)):
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            keys = sorted(first)
            order = np.array([first[key] for key in keys], np.intp)
    else:
        numbers = scalars.long_data.data
        count = len(numbers)
        keys = np.fromiter(numbers, np.int64, count)
        if len(keys) > 1 and not (keys[1:] > keys[:-1]).all():
            keys, order = np.unique(keys, return_index=True)
    # Without rows the server still names the fields, with empty payloads.
    others = {n: f for n, f in by_name.items() if n != key.name}
    columns = {n: column_of(f, count) for n, f in others.items()} if count else {}
    return Rows(keys, columns, order, answer.ByteSize())


@dataclass(slots=True)
class Comparison:
    missing: list[Key] = field(default_factory=list)
    extra: list[Key] = field(default_factory=list)
    different: list[tuple[Key, tuple[str, ...]]] = field(default_factory=list)
    common: int = 0


def _pair(source: Rows, sink: Rows) -> tuple[Indexes, Indexes]:
    if isinstance(source.keys, list) or isinstance(sink.keys, list):
        if source.keys == sink.keys:
            both = np.arange(len(source))
            return both, both
        places = {key: place for place, key in enumerate(sink.keys)}
        pairs = [(i, places[k]) for i, k in enumerate(source.keys) if k in places]
        return np.array([i for i, _ in pairs], np.intp), np.array([j for _, j in pairs], np.intp)
    if np.array_equal(source.keys, sink.keys):
        both = np.arange(len(source))
        return both, both
    _, left, right = np.intersect1d(source.keys, sink.keys, assume_unique=True, return_indices=True)
    return left, right


def _others(rows: Rows, paired: Indexes) -> list[Key]:
    if len(paired) == len(rows):
        return []
    alone = np.ones(len(rows), bool)
    alone[paired] = False
    return [rows.key(i) for i in np.flatnonzero(alone).tolist()]


def compare(source: Rows, sink: Rows, fields: Sequence[str]) -> Comparison:
    """What is missing, extra or different between two pages of the same key range."""
    left, right = _pair(source, sink)
    result = Comparison(_others(source, left), _others(sink, right), common=len(left))
    if not len(left):
        return result
    source_places, sink_places = source.places(left), sink.places(right)
    aligned = len(left) == len(source) == len(sink) and source.order is None and sink.order is None
    found: dict[int, list[str]] = {}
    for name in fields:
        mine, theirs = source.columns.get(name), sink.columns.get(name)
        if mine is None or theirs is None:
            if mine is not theirs:
                for row in range(len(left)):
                    found.setdefault(row, []).append(name)
            continue
        if aligned and mine.payload == theirs.payload:
            continue
        for row in np.flatnonzero(mine.differs(source_places, theirs, sink_places)).tolist():
            found.setdefault(row, []).append(name)
    result.different = [(source.key(int(left[r])), tuple(found[r])) for r in sorted(found)]
    return result
