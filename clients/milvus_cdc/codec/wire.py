"""Protobuf's wire format, walked without building messages.

https://protobuf.dev/programming-guides/encoding: a message is a run of (tag, value); a value with a
length is skipped in one step, so a column of any size costs the same.
"""

from __future__ import annotations

VARINT, FIXED64, LEN, FIXED32 = 0, 1, 2, 5


class BadWireError(Exception):
    """Not protobuf, or not laid out as a column is."""


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Value and the position after it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value = byte & 0x7F
    shift = 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + 1
        shift += 7
        if shift > 63:
            raise BadWireError("a varint of more than ten bytes")


def walk(data: bytes | memoryview, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """(field number, wire type, start and end of value) of every field between two positions."""
    fields = []
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = varint(data, at - 1)
            wire = tag & 7
            if wire == LEN:
                size = data[at]
                at += 1
                if size >= 0x80:
                    size, at = varint(data, at - 1)
                start, at = at, at + size
            elif wire == VARINT:
                start, at = at, varint(data, at)[1]
            elif wire == FIXED64:
                start, at = at, at + 8
            elif wire == FIXED32:
                start, at = at, at + 4
            else:
                raise BadWireError(f"wire type {wire}")
            fields.append((tag >> 3, wire, start, at))
    except IndexError:
        raise BadWireError("the column ends inside a field") from None
    if at != end:
        raise BadWireError("a field reaches beyond its message")
    return fields


def encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def delimited(number: int, *content: bytes | memoryview) -> list[bytes | memoryview]:
    """A field of that number around the content."""
    size = sum(map(len, content))
    return [encode_varint(number << 3 | LEN) + encode_varint(size), *content]
