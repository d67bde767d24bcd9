"""How far ahead in source time an owner may write, and how far it asks for."""

from __future__ import annotations

from milvus_cdc.model import ms_to_tso
from milvus_cdc.order.lane import Lane

HORIZON_STEP_MIN_MS = 2_000
"""Source time granted ahead at least: a quiet collection asks about once a second."""
HORIZON_STEP_MAX_MS = 30_000
HORIZON_REST_SLACK_MS = 1_000
"""Where nothing happens, twice as long is granted ahead as such a one says nothing and this: so
its next row finds a grant.
"""
HORIZON_REPORTS_MS = 3_000
"""At most this much source time passes between two reports."""


class Horizons:
    """Those of one collection's lanes."""

    def __init__(self) -> None:
        self.silence_ms = 0
        """So long nobody may be there to grant a horizon, and rows are to go on."""
        self.rest_ms = 3_000
        """So much time passes between two reports while nothing happens."""
        self._asked: dict[str, tuple[int, int]] = {}
        """Per vchannel: where it stood at the last grant, and how far that reached ahead."""

    def grant(self, lane: Lane, horizon_ts: int) -> None:
        if horizon_ts > lane.horizon_ts:
            front = lane.staged[0].ts if lane.staged else lane.released_ts
            self._asked[lane.vchannel] = (front, max(0, horizon_ts - front))
            lane.horizon_ts = horizon_ts

    def wanted(self, lane: Lane, *, resting: bool) -> int:
        """A TSO to ask for, or 0. The step follows the pace at which source time passes here, so
        that a catch-up does not ask all the time, and a crash costs upserts for one step only.
        """
        if lane.ended and not lane.staged:
            return 0
        front = lane.staged[0].ts if lane.staged else lane.released_ts
        if front == 0:
            return 0
        asked_at, step = self._asked.get(lane.vchannel, (front, 0))
        if front > lane.horizon_ts and step:
            step = 2 * step  # it had to wait: ask further ahead
        else:
            step = front - asked_at
        least = HORIZON_STEP_MIN_MS
        if resting:
            least = 2 * (self.rest_ms + HORIZON_REST_SLACK_MS)
        if self.silence_ms:
            # Asked for anew when half of it is left, at the next report.
            least = max(least, 2 * (self.silence_ms + HORIZON_REPORTS_MS))
        step = max(ms_to_tso(least), min(step, ms_to_tso(HORIZON_STEP_MAX_MS)))
        return front + step if front + step // 2 > lane.horizon_ts else 0
