"""Rows that the sink will never take, taken out of a write so that the rest can go on.

Laws: only rows are taken out, never a delete. A row counts as dealt with when its letter is
durable; a write that is begun again may write its letter again.
"""

from __future__ import annotations

from collections.abc import Sequence

from milvus_cdc.changes import as_list, part_of, row_keys
from milvus_cdc.codec.messages import Insert
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
            taken += [part_of(op, [row], self._key_field_id) for row in sorted(out[at])]
            kept = [row for row in range(op.rows) if row not in out[at]]
            if kept:
                rest.append(part_of(op, kept, self._key_field_id))
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
                first.append(part_of(op, range(left), self._key_field_id))
                second.append(part_of(op, range(left, op.rows), self._key_field_id))
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


def _like(write: Write) -> Write:
    return Write(write.write_id, write.kind, write.partition)
