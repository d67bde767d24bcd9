"""How busy an assignment is: rows and bytes a second, smoothed, from the counters of its reports.

Law: what has not been measured yet counts as idle; a pause between two reports is averaged over,
never taken for a burst.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTH_MS = 30_000
"""A change has two thirds of its effect after so long."""
ROWS_OF_ONE = 1_000.0
BYTES_OF_ONE = 1024.0 * 1024.0
"""So many rows or bytes a second weigh as much as one idle collection."""


@dataclass(slots=True)
class Rate:
    rows_per_second: float = 0.0
    bytes_per_second: float = 0.0
    _rows: int = -1
    _bytes: int = 0
    _at_ms: int = 0

    def count(self, at_ms: int, rows: int, bytes_: int) -> None:
        """The totals of a report."""
        passed_ms = at_ms - self._at_ms
        if self._rows < 0 or rows < self._rows or bytes_ < self._bytes:
            self._rows, self._bytes, self._at_ms = rows, bytes_, at_ms
            return
        if passed_ms <= 0:
            return
        part = 1.0 - math.exp(-passed_ms / SMOOTH_MS)
        seconds = passed_ms / 1000
        self.rows_per_second += part * ((rows - self._rows) / seconds - self.rows_per_second)
        self.bytes_per_second += part * ((bytes_ - self._bytes) / seconds - self.bytes_per_second)
        self._rows, self._bytes, self._at_ms = rows, bytes_, at_ms

    @property
    def weight(self) -> float:
        busy = max(self.rows_per_second / ROWS_OF_ONE, self.bytes_per_second / BYTES_OF_ONE)
        return 1.0 + busy


IDLE = Rate()

RESTING_MS = 3_000
RESTING_REPORTS_PER_SECOND = 150
"""Of all assignments together in which nothing happens: each costs a controller about 0.7 ms."""


def resting_ms(assignments: int) -> int:
    """How often each of so many is to report while only source time goes on."""
    return max(RESTING_MS, assignments * 1000 // RESTING_REPORTS_PER_SECOND)
