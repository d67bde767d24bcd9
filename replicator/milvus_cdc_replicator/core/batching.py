"""Bounds of a batch: the sink's own, what the user wants, what the task's limits allow."""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import Batching, RateLimits

from milvus_cdc_replicator.core.sequencer import WriteLimits

EVEN_SECONDS = 1.0
"""A batch holds no more than the limits allow in so long, so that rows come evenly; or in the time
for which it may linger.
"""


def bounded(
    own: WriteLimits, linger_seconds: float, wish: Batching, limits: RateLimits
) -> tuple[WriteLimits, float]:
    """With the seconds that an unfinished batch waits: of numbers the smallest one counts, of times
    what the user says.
    """
    seconds = linger_seconds if wish.linger_ms is None else wish.linger_ms / 1000

    def least(mine: int, wished: int, per_second: int) -> int:
        allowed = max(1, int(per_second * max(seconds, EVEN_SECONDS)))
        return min(mine, wished or mine, allowed if per_second else mine)

    arranged = replace(
        own,
        rows_per_request=least(own.rows_per_request, wish.max_rows, limits.rows_per_second),
        bytes_per_request=least(own.bytes_per_request, wish.max_bytes, limits.bytes_per_second),
        lingers=seconds > 0,
    )
    return arranged, seconds
