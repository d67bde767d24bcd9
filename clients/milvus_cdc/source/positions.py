"""Positions of queues that number their messages: 8 bytes little-endian.

Kafka offsets and NATS stream sequences are stored by Milvus in this form (seen on 2.3.5).
"""

from __future__ import annotations

from milvus_cdc.errors import BugError


def encode(number: int) -> bytes:
    return number.to_bytes(8, "little")


def decode(position: bytes) -> int:
    """Raises BugError BAD_POSITION for bytes that another queue made."""
    if len(position) != 8:
        raise BugError(
            "BAD_POSITION",
            f"a position of {len(position)} bytes ({position.hex()}) is not one of this queue; "
            "does the task name the queue that the source really writes to?",
        )
    return int.from_bytes(position, "little")


def back(position: bytes, entries: int) -> bytes:
    return encode(max(decode(position) - entries, 0))


def text(position: bytes) -> str:
    return str(decode(position))


class Numbered:
    """What a `LogSource` says of such positions."""

    def order(self, position: bytes) -> int:
        return decode(position)

    def back(self, position: bytes, entries: int) -> bytes:
        return back(position, entries)

    def behind(self, earlier: bytes, later: bytes) -> int:
        return max(decode(later) - decode(earlier), 0)

    def text(self, position: bytes) -> str:
        return text(position)
