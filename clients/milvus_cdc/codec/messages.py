"""What a log entry means: frozen messages whose columns stay bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64] | tuple[str, ...]
"""Primary keys of a batch: an int64 array, or strings."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Every message of the pchannel with a timestamp at or below `ts` lies before this tick."""

    ts: int


@dataclass(frozen=True, slots=True)
class Insert:
    """Rows of one vchannel and partition. `columns`: one serialized schema.FieldData per field."""

    vchannel: str
    collection_id: int
    partition_id: int
    partition_name: str
    ts: int
    """Largest of `timestamps[]` (milvus `msgstream/msg.go` takes the same as the message's end)."""
    num_rows: int
    columns: tuple[bytes, ...]
    msg_id: int
    size: int
    """Payload bytes of the log entry."""
    traceparent: str = ""
    """W3C trace context of the request."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Keys to delete. `partition_id` -1 and an empty name mean every partition."""

    vchannel: str
    """Empty in Milvus 2.2 (seen on 2.2.16): that of its collection on this topic."""
    collection_id: int
    partition_id: int
    partition_name: str
    ts: int
    keys: Keys
    msg_id: int
    size: int
    traceparent: str = ""

    def __eq__(self, other: object) -> bool:
        # Arrays compare one by one; a message that its producer sent again must just be equal.
        if not isinstance(other, Delete):
            return NotImplemented
        return self._but_keys() == other._but_keys() and np.array_equal(self.keys, other.keys)

    def __hash__(self) -> int:
        return hash(self._but_keys())

    def _but_keys(self) -> tuple[object, ...]:
        return (
            *(self.vchannel, self.collection_id, self.partition_id, self.partition_name),
            *(self.ts, self.msg_id, self.size, self.traceparent),
        )


@dataclass(frozen=True, slots=True)
class CreateCollection:
    collection_id: int
    ts: int


@dataclass(frozen=True, slots=True)
class DropCollection:
    collection_id: int
    ts: int


@dataclass(frozen=True, slots=True)
class DropPartition:
    collection_id: int
    partition_id: int
    partition_name: str
    ts: int


@dataclass(frozen=True, slots=True)
class Other:
    """A message that changes no rows of an ordinary collection (types named in `msgstream.py`)."""

    msg_type: int
    ts: int


Message = Tick | Insert | Delete | CreateCollection | DropCollection | DropPartition | Other
