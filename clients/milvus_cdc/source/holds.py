"""The seam to what keeps a queue from forgetting entries that are still to be read.

Only a queue that deletes what everyone has acknowledged needs it; the others forget by their own
limits, whatever anyone does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

HOLD_PREFIX = "milvus-cdc-"
"""Begins the name of every hold, so that those of nobody can be found."""


@dataclass(frozen=True, slots=True)
class HeldLog:
    """A hold as the queue sees it."""

    pchannel: str
    name: str
    entries: int = -1
    """Between its place and the log's end; -1 = not known."""
    size: int = -1
    """What they take at the queue, bytes; -1 = not known."""


class Hold(Protocol):
    """One hold, by a name that whoever takes over uses again. Errors: milvus_cdc.errors only."""

    async def advance(self, position: bytes | None) -> None:
        """Makes it where it is missing, at the oldest entry there is; then everything before the
        entry at `position` may go, and that one and all after it stay. None: it stays where it is.

        It goes back, too, as far as the entries are still there. Raises LogResetError when the
        topic does not exist.
        """
        ...

    async def release(self) -> None:
        """Removes it; it may be gone already."""
        ...

    async def look(self) -> HeldLog: ...


class Holds(Protocol):
    """All holds at one queue."""

    def hold(self, pchannel: str, name: str) -> Hold: ...

    async def find(self) -> list[HeldLog]:
        """All whose name begins with HOLD_PREFIX, whoever made them. Raises UserError
        HOLDS_NOT_LISTED where the queue cannot be asked.
        """
        ...

    async def warnings(self, pchannel: str) -> list[tuple[str, str]]:
        """(reason, message): settings of the queue that endanger a hold, or that a hold may set
        off. Empty where they cannot be asked for.
        """
        ...


@runtime_checkable
class HeldSource(Protocol):
    """A LogSource whose queue needs holds."""

    @property
    def holds(self) -> Holds: ...
