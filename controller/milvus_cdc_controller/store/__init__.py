"""The seam to where the controller keeps what must survive it: keys and small values.

Laws: one controller at a time has a store open, and every commit proves that it still is the one;
a commit's writes are carried out in the order given, and each group of `Store.writes_max` of them
all or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from milvus_cdc.errors import CdcError


class LeadershipLost(CdcError):
    """Another controller may be writing by now: this process must end at once."""

    def __init__(self, message: str) -> None:
        super().__init__("LEADERSHIP_LOST", message)


class Store(Protocol):
    """Opened by its class' `open`. Errors: RetryableError STORE_UNAVAILABLE, LeadershipLost."""

    @property
    def incarnation(self) -> int:
        """Grows with every start of a controller on this store."""
        ...

    @property
    def writes_max(self) -> int:
        """Most writes that are stored as one."""
        ...

    @property
    def certain(self) -> bool:
        """No other controller can be leading now. While it is not so, no lease may be renewed."""
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
