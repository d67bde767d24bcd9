"""The controller's clocks."""

from __future__ import annotations

import time

from milvus_cdc_controller.core.events import Instant

# CLOCK_BOOTTIME also counts while the machine is suspended, so that a lease cannot outlive a sleep.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> Instant:
    return Instant(time.clock_gettime_ns(_CLOCK) // 1_000_000, time.time_ns() // 1_000_000)
