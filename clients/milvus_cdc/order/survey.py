"""What stays of messages whose payloads were given up: enough to read them again in portions.

Laws: a portion ends between two timestamps, so that what belongs together at one timestamp stays
together; hence the end of a portion serves as a tick: everything at or below it has been read.
Positions are kept here and there only: reading again may begin earlier than it must, never later.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

MARK_EVERY_BYTES = 128 * 1024
_MESSAGE_BYTES = 24
_MARK_BYTES = 200


@dataclass(frozen=True, slots=True)
class Portion:
    """The messages beyond the portion before and at or below `until_ts`."""

    until_ts: int
    start: bytes
    """Position at or before the first of its messages in the log."""
    last_order: int
    """Of the last of its messages in the log."""
    read_from: bytes
    """Position at or before every message beyond `until_ts`."""


class Survey:
    """Timestamp, place and size of each message, in log order."""

    def __init__(self) -> None:
        self._ts = array("Q")
        self._orders = array("Q")
        self._sizes = array("Q")
        self._marks: list[tuple[int, bytes]] = []
        self._unmarked = 0

    @property
    def held_bytes(self) -> int:
        return _MESSAGE_BYTES * len(self._ts) + _MARK_BYTES * len(self._marks)

    def add(self, ts: int, order: int, size: int, position: bytes) -> None:
        self._ts.append(ts)
        self._orders.append(order)
        self._sizes.append(size)
        self._unmarked += size
        if not self._marks or self._unmarked >= MARK_EVERY_BYTES:
            self._marks.append((order, position))
            self._unmarked = 0

    @property
    def start(self) -> bytes:
        """Position of the first message."""
        return self._marks[0][1]

    def portions(
        self, tick_ts: int, tick_position: bytes, most_bytes: int, late_ts: int = 0
    ) -> list[Portion]:
        """Everything at or below the tick, in timestamp order, about `most_bytes` each; more only
        where a single timestamp has more. What is at or below `late_ts`, if anything, is the first.
        """
        ts, orders, sizes = self._ts, self._orders, self._sizes
        by_ts = sorted(range(len(ts)), key=ts.__getitem__)
        due = [at for at in by_ts if ts[at] <= tick_ts]
        groups: list[list[int]] = []
        held = 0
        group_at = sum(ts[at] <= late_ts for at in due)
        if group_at:
            groups.append(due[:group_at])
            held = most_bytes
        while group_at < len(due):
            end = group_at + 1
            while end < len(due) and ts[due[end]] == ts[due[group_at]]:
                end += 1
            size = sum(sizes[at] for at in due[group_at:end])
            if not groups or held + size > most_bytes:
                groups.append([])
                held = 0
            groups[-1].extend(due[group_at:end])
            held += size
            group_at = end
        beyond = self._oldest(by_ts[len(due) :])
        portions: list[Portion] = []
        until_ts = tick_ts
        for group in reversed(groups):
            first = self._oldest(group)
            assert first is not None
            portions.append(
                Portion(
                    until_ts,
                    self._mark(first),
                    max(orders[at] for at in group),
                    tick_position if beyond is None else self._mark(beyond),
                )
            )
            beyond = first if beyond is None else min(first, beyond)
            until_ts = ts[group[0]] - 1
        portions.reverse()
        return portions

    def _oldest(self, group: Iterable[int]) -> int | None:
        return min((self._orders[at] for at in group), default=None)

    def _mark(self, order: int) -> bytes:
        return self._marks[bisect_right(self._marks, order, key=lambda mark: mark[0]) - 1][1]
