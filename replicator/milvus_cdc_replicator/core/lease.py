"""May this process still write? The arithmetic of the lease, on a clock that the shell provides.

Law: a write starts only if its deadline ends before the lease. The lease runs from the moment at
which an acknowledged heartbeat was *sent*, on a clock that counts suspend (CLOCK_BOOTTIME), so a
frozen process finds it expired.
"""

from __future__ import annotations

from collections import OrderedDict

_PENDING_MAX = 64


class Lease:
    """Invariant: the expiry only grows."""

    def __init__(self) -> None:
        self._expires_at = float("-inf")
        self._ttl = 0.0
        self._sent: OrderedDict[int, float] = OrderedDict()

    def configure(self, ttl_seconds: float) -> None:
        """The controller's terms, from Welcome."""
        self._ttl = ttl_seconds

    @property
    def ttl(self) -> float:
        return self._ttl

    def heartbeat_sent(self, seq: int, now: float) -> None:
        self._sent[seq] = now
        while len(self._sent) > _PENDING_MAX:
            self._sent.popitem(last=False)

    def heartbeat_acked(self, seq: int) -> None:
        sent = self._sent.pop(seq, None)
        if sent is not None:
            self._expires_at = max(self._expires_at, sent + self._ttl)

    def remaining(self, now: float) -> float:
        """Seconds; 0 when expired."""
        return max(0.0, self._expires_at - now)

    def write_timeout(self, now: float, wanted: float, least: float) -> float | None:
        """The deadline a write that starts now may have, in seconds; None when too little is
        left to start one.
        """
        left = self.remaining(now)
        return None if left < least else min(wanted, left)
