"""A thread that reads ahead of the event loop: for clients whose calls block.

Laws: an entry is either returned or kept for the next call, whenever that is cancelled; the thread
stops while what it handed over and nobody took yet exceeds half of what a call asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from milvus_cdc.errors import RetryableError
from milvus_cdc.source import LogEntry


class ReadAhead:
    """`fetch` and, at the end, `ended` are called in the thread, nothing of them elsewhere.

    What `fetch` raises comes to the reader behind the entries before it: a RetryableError once,
    with the next read fetching again; any other error from then on at every read.
    """

    def __init__(
        self, name: str, fetch: Callable[[], list[LogEntry]], ended: Callable[[], None]
    ) -> None:
        self._fetch = fetch
        self._ended = ended
        self._entries: deque[LogEntry] = deque()
        self._window = 0
        self._handed = self._taken = 0
        """Bytes so far; the first is counted by the thread, the second by the loop."""
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._wanted = threading.Event()
        """Set: the thread reads; cleared while it is ahead by half a window, and by an error."""
        self._closed = False

    @property
    def batch_bytes(self) -> int:
        """How much a `fetch` should bring at most, near enough."""
        return self._window // 2

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        """As `LogReader.read`."""
        self._window = max_bytes
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        if not self._entries and self._error is None:
            self._arrived.clear()
            if not self._wanted.is_set():
                self._wanted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await self._arrived.wait()
        # Nothing below waits: entries are taken only by a call that returns them.
        if not self._entries and self._error is not None:
            error = self._error
            if isinstance(error, RetryableError):
                # Said once; the next read tries again.
                self._error = None
            raise error
        return self._take(max_bytes)

    async def close(self) -> None:
        self._closed = True
        self._wanted.set()
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)

    def _accept(self, entries: list[LogEntry], error: BaseException | None) -> None:
        self._entries.extend(entries)
        if error is not None:
            self._error = error
        self._arrived.set()

    def _take(self, max_bytes: int) -> list[LogEntry]:
        taken: list[LogEntry] = []
        size = 0
        while self._entries:
            size += len(self._entries[0].payload)
            if taken and size > max_bytes:
                break
            taken.append(self._entries.popleft())
        self._taken += sum([len(entry.payload) for entry in taken])
        if not self._wanted.is_set() and self._error is None and not self._far_ahead():
            self._wanted.set()
        return taken

    def _far_ahead(self) -> bool:
        return self._handed - self._taken > self._window // 2

    # Everything below runs in the thread.

    def _run(self) -> None:
        assert self._loop is not None
        while self._wanted.wait() and not self._closed:
            entries: list[LogEntry] = []
            failed: BaseException | None = None
            try:
                entries = self._fetch()
            except BaseException as error:
                failed = error
            self._handed += sum([len(entry.payload) for entry in entries])
            if failed is not None or self._far_ahead():
                self._wanted.clear()
                if self._closed or (failed is None and not self._far_ahead()):
                    self._wanted.set()  # what was asked for while it was being cleared
            if entries or failed is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._accept, entries, failed)
        self._ended()
