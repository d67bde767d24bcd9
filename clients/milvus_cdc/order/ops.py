"""Nouns of a log put in order: what one vchannel's log says, columns and keys opaque.

Key sets are built only when something asks for them: a stream of plain inserts never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

Key = int | str


class Rank(IntEnum):
    """Order at equal timestamps: a delete removes only what is older than itself, so it goes
    first.
    """

    DELETE = 0
    INSERT = 1
    MARKER = 2


@dataclass(slots=True, eq=False)
class LogOp:
    """Rows or keys of one log message, or a drop marker.

    `payload` is the shell's message. `size` counts against the memory budget until the operation is
    durable.
    """

    rank: Rank
    ts: int
    order: int
    """Sorts log positions within the pchannel."""
    position: bytes
    payload: Any
    size: int = 0
    rows: int = 0
    partition_id: int = -1
    partition: str = ""
    msg_id: int = 0
    drops_collection: bool = False
    load_keys: Callable[[], frozenset[Key]] | None = None
    restrict: Callable[[frozenset[Key]], LogOp] | None = None
    """The same of these keys' rows alone."""
    batch: TickBatch | None = None
    paired: list[LogOp] = field(default_factory=list)
    """Deletes of the same source upsert: durable when this operation is."""
    replaces: bool = False
    """The insert half of a source upsert, or a row that may be there already."""
    _keys: frozenset[Key] | None = None

    def keys(self) -> frozenset[Key]:
        if self._keys is None:
            assert self.load_keys is not None
            self._keys = self.load_keys()
        return self._keys


@dataclass(slots=True, eq=False)
class TickBatch:
    """What one tick released in one vchannel, until all of it is durable."""

    ts: int
    read_from: bytes
    outstanding: int
    corrects_ts: int | None = None
    """It says anew what is done up to this tick, because messages came behind it: no place inside
    may be a checkpoint, for it goes back behind ones before.
    """


@dataclass(frozen=True, slots=True)
class Mark:
    """Everything of a vchannel at or below `resolved_ts` is taken; `read_from` lies at or before
    the first message that is not.
    """

    vchannel: str
    read_from: bytes
    resolved_ts: int
