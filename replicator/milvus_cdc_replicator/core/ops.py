"""Requests to the sink, as the sequencer forms them of a log's operations."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from milvus_cdc.order.ops import Key, LogOp, Mark


class WriteKind(StrEnum):
    INSERT = "INSERT"
    UPSERT = "UPSERT"
    DELETE = "DELETE"
    CHANGES = "CHANGES"
    """Whatever came, in order."""


@dataclass(slots=True, eq=False)
class Write:
    """One request to the sink."""

    write_id: int
    kind: WriteKind
    partition: str
    ops: list[LogOp] = field(default_factory=list)
    rows: int = 0
    size: int = 0
    marks: dict[str, Mark] = field(default_factory=dict)
    """By vchannel: how far it stands when this is durable, where the sink is to remember that."""
    refused: list[LogOp] = field(default_factory=list)
    """Rows of it that the sink will not take: they are in the dead letters instead."""
    _keys: set[Key] | None = None

    def append(self, op: LogOp) -> None:
        self.ops.append(op)
        self.rows += op.rows
        self.size += op.size
        if self._keys is not None:
            self._keys.update(op.keys())

    def keys(self) -> set[Key]:
        if self._keys is None:
            self._keys = set()
            for op in self.ops:
                self._keys.update(op.keys())
        return self._keys
