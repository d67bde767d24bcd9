"""A proxy before PostgreSQL that breaks connections at chosen moments, or speaks TLS for it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Self

_SSL_REQUEST = (80877103).to_bytes(4, "big")


class PostgresProxy:
    """Listens on `port` of 127.0.0.1. With `tls` it answers an SSLRequest as a server does."""

    def __init__(self, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target_port = target_port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.StreamWriter] = set()
        self.on_request: Callable[[bytes], bool | None] = lambda data: None
        """Asked of what a client sends: False is not passed on and breaks the connection, True is
        passed on and breaks it when the server has answered, whose answer is lost.
        """

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for stream in self._streams:
            stream.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            there_reader, there_writer = await asyncio.open_connection(
                "127.0.0.1", self._target_port
            )
            self._streams |= {writer, there_writer}
            first = await reader.readexactly(8)
            if self._tls is not None and first[4:] == _SSL_REQUEST:
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(self._tls)
            else:
                there_writer.write(first)
            deaf = asyncio.Event()
            for work in (
                self._requests(reader, there_writer, writer, deaf),
                self._answers(there_reader, writer, deaf),
            ):
                self._tasks.add(asyncio.create_task(work))

    async def _requests(
        self,
        source: asyncio.StreamReader,
        there: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
        deaf: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await source.read(65536):
                passed = self.on_request(data)
                if passed is False:
                    back.transport.abort()
                    there.transport.abort()
                    return
                if passed is True:
                    deaf.set()
                there.write(data)
                await there.drain()
        there.close()

    async def _answers(
        self, source: asyncio.StreamReader, back: asyncio.StreamWriter, deaf: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await source.read(65536):
                if deaf.is_set():
                    back.transport.abort()
                    return
                back.write(data)
                await back.drain()
        back.close()
