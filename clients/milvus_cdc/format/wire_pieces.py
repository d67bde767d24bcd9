"""Pieces that Avro's and Protobuf's encodings share: varints, lengths, little-endian numbers.

Facts: both write integers as base-128 varints of up to 64 bits, least significant group first, and
signed ones either as zigzag (Avro) or as two's complement (Protobuf int32, int64); floats and
doubles as IEEE 754, little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from milvus_cdc.format import assemble

_FEW = 32
"""So few numbers are encoded sooner one by one."""


def varint(value: int) -> bytes:
    """Of a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varints(values: NDArray[np.uint64]) -> tuple[bytes, NDArray[np.int64]]:
    """All of them one after the other, and where each begins and ends (one more than values)."""
    ends = np.zeros(len(values) + 1, np.int64)
    if not len(values):
        return b"", ends
    width = max(1, -(-int(values.max()).bit_length() // 7))
    lengths = np.ones(len(values), np.int64)
    for count in range(1, width):
        lengths += values >= np.uint64(1 << 7 * count)
    groups = np.empty((len(values), width), np.uint8)
    for at in range(width):
        groups[:, at] = (values >> np.uint64(7 * at)) & np.uint64(0x7F) | np.uint64(0x80)
    rows = np.arange(len(values))
    groups[rows, lengths - 1] &= 0x7F
    np.cumsum(lengths, out=ends[1:])
    flat = groups[np.arange(width) < lengths[:, None]]
    return flat.tobytes(), ends


def varint_pieces(values: NDArray[np.uint64]) -> list[bytes]:
    """Each on its own."""
    if len(values) <= _FEW:
        return [varint(value) for value in values.tolist()]
    flat, ends = varints(values)
    return assemble.slices(flat, ends)


def zigzag(values: NDArray[Any]) -> NDArray[np.uint64]:
    wide = values.astype(np.int64)
    return ((wide << 1) ^ (wide >> 63)).view(np.uint64)


def twos_complement(values: NDArray[Any]) -> NDArray[np.uint64]:
    return values.astype(np.int64).view(np.uint64)


_SHORT = [varint(length) for length in range(4096)]
_SHORT_ZIGZAG = [varint(2 * length) for length in range(4096)]


def prefixed(pieces: list[bytes]) -> list[bytes]:
    """Each with its length before it, as Protobuf has it."""
    return [(_SHORT[len(p)] if len(p) < 4096 else varint(len(p))) + p for p in pieces]


def prefixed_zigzag(pieces: list[bytes]) -> list[bytes]:
    """Each with its length before it, as Avro has it."""
    return [(_SHORT_ZIGZAG[len(p)] if len(p) < 4096 else varint(2 * len(p))) + p for p in pieces]
