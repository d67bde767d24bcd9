"""Positions of Pulsar: its `MessageIdData`, as Milvus writes it to etcd.

Laws: places are compared by (ledger, entry, batch index) and nothing else: the same message read
back has another partition than the one stored, and the client's own comparison then calls it newer.
An unbatched message (index -1) stands at index 0. The end of a log is the place right after its
last message, in the same entry.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError
from milvuscdc.internal.pulsar_wire_pb2 import MessageIdData

from milvus_cdc.errors import BugError, LogTruncatedError

_ENTRY_BITS = 64
_BATCH_BITS = 32


class Place(NamedTuple):
    """Compared as a tuple; `batch` is 0 for an unbatched message."""

    ledger: int
    entry: int
    batch: int = 0

    def __str__(self) -> str:
        """`ledger:entry`, as Pulsar's tools show it, and the batch index where it is not 0."""
        return f"{self.ledger}:{self.entry}" + (f":{self.batch}" if self.batch else "")

    @property
    def after(self) -> Place:
        """The place right behind it, where no message is."""
        return self._replace(batch=self.batch + 1)


BEGINNING = Place(0, 0)


def encode(place: Place) -> bytes:
    data = MessageIdData(ledgerId=place.ledger, entryId=place.entry)
    if place.batch:
        data.batch_index = place.batch
    return data.SerializeToString(deterministic=True)


def decode(position: bytes) -> Place:
    """Raises BugError BAD_POSITION for bytes that another queue made."""
    place = _parsed(position)
    if place is None:
        raise BugError(
            "BAD_POSITION",
            f"a position of {len(position)} bytes ({position.hex()}) is not one of Pulsar; "
            "does the task name the queue that the source really writes to?",
        )
    return place


def looks_like_one(position: bytes) -> bool:
    """Whether they are a message id. The offset of a log with fewer than 2**48 entries never is:
    its upper bytes are no field.
    """
    return _parsed(position) is not None


def order(place: Place) -> int:
    return ((place.ledger << _ENTRY_BITS) + place.entry << _BATCH_BITS) + place.batch


def gone(pchannel: str, wanted: Place, first: Place | None) -> LogTruncatedError:
    return LogTruncatedError(
        f"topic {pchannel} no longer holds message {wanted}; "
        + (f"the first one still there is {first}" if first else "nothing is left of it")
        + ". What came between is lost to this task: nothing kept it from being deleted. Give the "
        "namespace a retention, or the task a hold, then resync"
    )


def text(position: bytes) -> str:
    return str(decode(position))


def _parsed(position: bytes) -> Place | None:
    data = MessageIdData()
    try:
        data.ParseFromString(position)
    except DecodeError:
        return None
    whole = data.HasField("ledgerId") and data.HasField("entryId")
    if not whole or max(data.ledgerId, data.entryId) >= 1 << 63:
        return None
    return Place(data.ledgerId, data.entryId, max(data.batch_index, 0))
