"""Connections between processes that are slow, break, and can be held up, all in one thread.

Law: what a connection carries arrives in order and unchanged, or the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

LATE = 0.1
LATE_SECONDS = 0.5
CUT_EACH_SECOND = 0.01
CHUNK = 65_536


class Wire:
    """Forwards from `address` to `target` (both host:port)."""

    def __init__(self, target: str, rng: random.Random) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._rng = rng
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.cuts = 0
        self.address = ""

    async def listen(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._spawn(server.serve_forever())
        self._spawn(self._fate())

    def hold(self, held: bool) -> None:
        """Nothing passes, and nobody hears why, until it is let go."""
        if held:
            self._open.clear()
        else:
            self._open.set()

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._cut()

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fate(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self._writers and self._rng.random() < CUT_EACH_SECOND:
                self.cuts += 1
                self._cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, back), (there, writer)):
            self._writers.add(sink)
            self._spawn(self._pump(source, sink))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                if self._rng.random() < LATE:
                    await asyncio.sleep(self._rng.uniform(0, LATE_SECONDS))
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(sink)
            sink.transport.abort()


class Wires:
    """Wires made from one seed."""

    def __init__(self, seed: object) -> None:
        self._rng = random.Random(f"wires {seed}")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._wires: list[Wire] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        async def close() -> None:
            for wire in self._wires:
                wire.close()
            await asyncio.sleep(0.1)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._loop.close()

    def to(self, target: str) -> Wire:
        async def make() -> Wire:
            wire = Wire(target, random.Random(self._rng.random()))
            await wire.listen()
            return wire

        wire = asyncio.run_coroutine_threadsafe(make(), self._loop).result()
        self._wires.append(wire)
        return wire

    def hold(self, wires: list[Wire], held: bool) -> None:
        for wire in wires:
            self._loop.call_soon_threadsafe(wire.hold, held)

    @property
    def cuts(self) -> int:
        return sum(wire.cuts for wire in self._wires)
