"""What waits to be written to one replicator's stream: bounded, newest state of each assignment
only.

Laws: until the session is synced every message keeps its place; after that a newer message of the
same kind and assignment replaces the older one, which nobody needs any more. Heartbeat acks are
held back until then, because a lease must not be renewed before its holder has been told what it
may not hold; once that is on its way they go before all that waits, so that no lease ends behind
thousands of assignments.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from milvus_cdc_controller.core import effects as fx

MESSAGES_MAX = 20_000


class Outbox:
    """Filled by the control loop, emptied by the stream's writer."""

    def __init__(self, messages_max: int = MESSAGES_MAX) -> None:
        self._messages: OrderedDict[object, fx.StreamMessage] = OrderedDict()
        self._messages_max = messages_max
        self._ready = asyncio.Event()
        self._synced = False
        self._told = False
        """What came before the session was synced does not wait any more."""
        self._count = 0
        self.closed: tuple[str, str] | None = None
        """Reason and message once the stream is to end."""

    def put(self, message: fx.StreamMessage) -> bool:
        """False when the reader is too slow for it: the stream must be dropped."""
        if self.closed is not None:
            return True
        if isinstance(message, fx.HeartbeatAck) and not self._synced:
            return True
        self._count += 1
        key: object = self._count
        if self._synced:
            key = _key(message) or key
        self._messages.pop(key, None)
        self._messages[key] = message
        if isinstance(message, fx.HeartbeatAck) and self._told:
            self._messages.move_to_end(key, last=False)
        if isinstance(message, fx.Synced):
            self._synced = True
        self._ready.set()
        return len(self._messages) <= self._messages_max

    def close(self, reason: str, message: str) -> None:
        if self.closed is None:
            self.closed = (reason, message)
            self._messages.clear()
            self._ready.set()

    async def take(self) -> list[fx.StreamMessage] | None:
        """Everything that waits, at least one; None once closed."""
        await self._ready.wait()
        self._ready.clear()
        if self.closed is not None:
            self._ready.set()
            return None
        self._told = self._synced
        messages = list(self._messages.values())
        self._messages.clear()
        return messages


def _key(message: fx.StreamMessage) -> tuple[object, ...] | None:
    match message:
        case fx.Assign(assignment_id=assignment_id):
            return ("assign", assignment_id)
        case fx.ProgressAck(assignment_id=assignment_id, epoch=epoch):
            return ("progress", assignment_id, epoch)
        case fx.HeartbeatAck():
            return ("heartbeat",)
    return None
