"""One thing after the other for each assignment, and all assignments beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()


class Turns:
    """Work under way, by assignment."""

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Task[None]] = {}
        """The work of each assignment that was begun last and has not ended."""

    def begin(self, assignment_id: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` when all that was begun before for this assignment has ended. What it raises
        goes to the log.
        """
        before = self._last.get(assignment_id)

        async def turn() -> None:
            if before is not None:
                await asyncio.wait({before})
            try:
                await work()
            except Exception:
                log.exception("unexpected failure", assignment_id=assignment_id)

        def forget(task: asyncio.Task[None]) -> None:
            if self._last.get(assignment_id) is task:
                del self._last[assignment_id]

        task = asyncio.create_task(turn(), name=f"turn of {assignment_id}")
        self._last[assignment_id] = task
        task.add_done_callback(forget)

    async def ended(self) -> None:
        """Until none is under way."""
        while self._last:
            await asyncio.wait(self._last.values())
