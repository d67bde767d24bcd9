"""What a NATS stream says of itself: what it holds, and which of its name it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from nats.js.api import StreamInfo

from milvus_cdc.errors import LogResetError, LogTruncatedError
from milvus_cdc.source import check_incarnation
from milvus_cdc.source.positions import encode


def check_stream(pchannel: str, info: StreamInfo, wanted: int, incarnation: bytes) -> None:
    """Whether the stream is the incarnation that is meant, and holds sequence `wanted`."""
    check_incarnation(pchannel, incarnation, incarnation_of(info))
    first, end = bounds(info)
    if wanted > end:
        raise LogResetError(
            f"stream {pchannel} ends before sequence {end}, position {wanted} lies beyond: "
            "it was deleted and made again, or lost its end; resync"
        )
    # Sequences start at 1: position 0 is the beginning.
    if max(wanted, 1) < first:
        raise LogTruncatedError(
            f"stream {pchannel} no longer holds sequence {wanted}; "
            f"the first one still there is {first}"
        )


def bounds(info: StreamInfo) -> tuple[int, int]:
    """First sequence still there and the next to be written, equal when there is none."""
    end = info.state.last_seq + 1
    return (info.state.first_seq if info.state.messages else end), end


def incarnation_of(info: StreamInfo) -> bytes:
    """When the stream was made, in microseconds: it stays through restarts of the server."""
    if info.created is None:
        return b""
    return encode((info.created - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1))
