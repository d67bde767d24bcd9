"""Rows that the sink will never take, taken out of a write so that the rest can go on.

Laws: only rows are taken out, never a delete. A row counts as dealt with when its letter is
durable; a write that is begun again may write its letter again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from milvus_cdc.changes import as_list, row_keys
from milvus_cdc.codec.columns import select_rows
from milvus_cdc.codec.messages import Delete, Insert
from milvus_cdc.errors import RowRefusedError
from milvus_cdc.order.ops import Key, LogOp

from milvus_cdc_replicator.core.ops import Write

Place = tuple[int, int]
"""(operation in a write, row in it)."""


class Refusing:
    """Knows which column holds the primary key of one collection."""

    def __init__(self, key_field_id: int) -> None:
        self._key_field_id = key_field_id

    def named(self, write: Write, error: RowRefusedError) -> list[Place]:
        """Those that the error names, as far as they are rows of this write; in order."""
        places = list(error.rows)
        if error.key is not None:
            places += self._newest(write, error.key)
        if not places and write.rows == 1:
            places = [(0, 0)]
        return sorted(
            {
                (at, row)
                for at, row in places
                if at < len(write.ops)
                and row < write.ops[at].rows
                and isinstance(write.ops[at].payload, Insert)
            }
        )

    def without(self, write: Write, places: Sequence[Place]) -> tuple[Write, list[LogOp]]:
        """The rest of it, and what was taken out, one operation a row."""
        out: dict[int, set[int]] = {}
        for at, row in places:
            out.setdefault(at, set()).add(row)
        rest = _like(write)
        taken: list[LogOp] = []
        for at, op in enumerate(write.ops):
            if at not in out:
                rest.append(op)
                continue
            taken += [self._part(op, [row]) for row in sorted(out[at])]
            kept = [row for row in range(op.rows) if row not in out[at]]
            if kept:
                rest.append(self._part(op, kept))
        rest.marks.update(write.marks)
        return rest, taken

    def parts(self, write: Write) -> list[Write]:
        """Two halves of more than one row, and what the sink is to remember when both are there."""
        first, second = _like(write), _like(write)
        left = write.rows // 2
        for op in write.ops:
            if left >= op.rows:
                first.append(op)
            elif left > 0:
                first.append(self._part(op, range(left)))
                second.append(self._part(op, range(left, op.rows)))
            else:
                second.append(op)
            left -= min(left, op.rows)
        if not write.marks:
            return [first, second]
        last = _like(write)
        last.marks.update(write.marks)
        return [first, second, last]

    def _newest(self, write: Write, key: Key) -> list[Place]:
        for at in range(len(write.ops) - 1, -1, -1):
            payload = write.ops[at].payload
            if isinstance(payload, Insert):
                keys = as_list(row_keys(payload, self._key_field_id))
                if key in keys:
                    return [(at, len(keys) - 1 - keys[::-1].index(key))]
        return []

    def _part(self, op: LogOp, rows: Sequence[int]) -> LogOp:
        message = op.payload
        size = op.size * len(rows) // max(1, op.rows)
        part: Insert | Delete
        if isinstance(message, Delete):
            keys = message.keys
            chosen = tuple(keys[r] for r in rows) if isinstance(keys, tuple) else keys[list(rows)]
            part = replace(message, keys=chosen, size=size)
        else:
            columns = tuple(select_rows(column, rows) for column in message.columns)
            part = replace(message, columns=columns, num_rows=len(rows), size=size)
        return replace(
            op,
            payload=part,
            size=size,
            rows=len(rows),
            load_keys=lambda: frozenset(self._keys(part)),
            batch=None,
            paired=[],
            _keys=None,
        )

    def _keys(self, message: Insert | Delete) -> list[Key]:
        if isinstance(message, Delete):
            return as_list(message.keys)
        return as_list(row_keys(message, self._key_field_id))


def _like(write: Write) -> Write:
    return Write(write.write_id, write.kind, write.partition)
