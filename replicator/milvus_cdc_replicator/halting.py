"""Waiting that an order to halt cuts short.

Law: only what may be given up at any moment waits here: looks, and pauses between tries. A change
at a sink is left to come to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from milvus_cdc.errors import RetryableError

T = TypeVar("T")


class Halted(Exception):
    """The caller was told to stop while it waited."""


async def unless_halted(
    halt: asyncio.Event, call: Callable[[], Awaitable[T]], *, seconds: float | None = None
) -> T:
    """What `call` answers; it is cancelled by the order to halt, or after so many seconds (None:
    however long it takes). Raises Halted, RetryableError SINK_TIMEOUT, and what `call` raises.
    """
    if halt.is_set():
        raise Halted
    work = asyncio.ensure_future(call())
    halted = asyncio.create_task(halt.wait())
    try:
        await asyncio.wait({work, halted}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if halted.done():
            raise Halted
        raise RetryableError("SINK_TIMEOUT", f"no answer within {seconds:.0f} s")
    finally:
        for task in (work, halted):
            task.cancel()
        await asyncio.gather(work, halted, return_exceptions=True)


async def pause(halt: asyncio.Event, seconds: float) -> None:
    """Raises Halted when told to stop before it is over."""
    try:
        await asyncio.wait_for(halt.wait(), seconds)
    except TimeoutError:
        return
    raise Halted
