"""Says when a checkpoint comes near the edge of what the queue keeps, and when it is safe again."""

from __future__ import annotations

import structlog

from milvus_cdc_controller.core.positions import retention_of
from milvus_cdc_controller.core.retention import Retention
from milvus_cdc_controller.core.world import World

log = structlog.get_logger(__name__)

RETENTION_LOW = "RETENTION_LOW"


def retention_text(left: Retention) -> str:
    """What is left of what, and the way out."""
    if left.left_ms == 0 or left.left_bytes == 0:
        return (
            "Its place in the queue is at the end of what the queue keeps, or beyond: resume the "
            "task at once, or give the queue a longer retention; else only a resync leads out."
        )
    parts = []
    if left.left_ms > 0:
        parts.append(f"{_span(left.left_ms)} of {_span(left.limit_ms)}")
    if left.left_bytes > 0:
        parts.append(f"{left.left_bytes >> 20} of {left.limit_bytes >> 20} MiB")
    return (
        f"The queue forgets its place soon: {' and '.join(parts)} left. Let it catch up (resume or "
        "retry it), or give the queue a longer retention."
    )


def _span(milliseconds: int) -> str:
    seconds = milliseconds // 1000
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds} s"


class RetentionAlarm:
    """Remembers what it has said."""

    def __init__(self) -> None:
        self._low: set[str] = set()

    def observe(self, world: World) -> None:
        low: set[str] = set()
        for key in world.retention:
            record = world.record_of(key)
            if record is None:
                continue
            left = retention_of(world, world.progress[key], key)
            if not left.low(world.warn_fraction):
                continue
            low.add(key)
            if key not in self._low:
                log.warning(
                    "retention low",
                    task=world.tasks[record.task_uid].spec.name,
                    collection=record.sink_name,
                    left_seconds=left.left_ms // 1000,
                    left_bytes=left.left_bytes,
                )
        for key in self._low - low:
            record = world.record_of(key)
            if record is not None:
                log.info(
                    "retention no longer low",
                    task=world.tasks[record.task_uid].spec.name,
                    collection=record.sink_name,
                )
        self._low = low
