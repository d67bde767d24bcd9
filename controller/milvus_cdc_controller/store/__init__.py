"""The seam to where the controller keeps what must survive it: keys and small values.

Laws: one controller at a time has a store open, and every commit proves that it still is the one;
a commit's writes are carried out all or not at all, and before those of any later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from milvus_cdc.errors import CdcError


class LeadershipLost(CdcError):
    """Another controller may be leading by now: this one must stop doing so at once."""

    def __init__(self, message: str, reason: str = "LEADERSHIP_LOST") -> None:
        super().__init__(reason, message)


class Store(Protocol):
    """Opened by its class' `open`. Errors: RetryableError STORE_UNAVAILABLE, LeadershipLost."""

    @property
    def incarnation(self) -> int:
        """Grows with every start of a controller on this store."""
        ...

    @property
    def certain(self) -> bool:
        """No other controller can be leading now. Once it is not so, it never is again."""
        ...

    async def lost(self) -> LeadershipLost:
        """Returns only when this controller must not go on."""
        ...

    async def load(self) -> dict[str, bytes]:
        """Everything stored."""
        ...

    async def commit(self, writes: Mapping[str, bytes | None]) -> None:
        """Durable when it returns; None deletes. A failed commit may be repeated."""
        ...

    async def close(self) -> None:
        """Lets another controller open it."""
        ...
