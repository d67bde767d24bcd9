"""Mutual TLS in front of a server that has none, as a side-car ends it: whoever connects must show
a certificate of the authority, and what he says is passed on to the server in clear.

python examples/tls_front.py --listen 0.0.0.0:4223 --to 127.0.0.1:4222 \
    --certificate queue.pem --key queue-key.pem --client-ca ca.pem

The server must be reachable over loopback only, or the door beside this one is open.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
Read = Callable[[], Awaitable[bytes]]
Write = Callable[[bytes], Awaitable[None]]

CHUNK_BYTES = 256 * 1024
HANDSHAKE_SECONDS = 10.0


def context(certificate: str, key: str, client_ca: str) -> ssl.SSLContext:
    """Raises OSError for files that cannot be used."""
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    made.load_cert_chain(certificate, key)
    made.verify_mode = ssl.CERT_REQUIRED
    return made


class Caller:
    """A connection whose TLS is done here and not by asyncio, which ends one that it refuses
    without a word: this one's callers read in an alert what is wrong with their certificate.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext
    ) -> None:
        self._reader, self._writer = reader, writer
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._received, self._to_send, server_side=True)

    async def shake_hands(self) -> None:
        """Raises OSError (ssl.SSLError is one)."""
        await self._do(self._tls.do_handshake)

    async def read(self) -> bytes:
        """Empty at the end. Raises OSError."""
        try:
            return await self._do(lambda: self._tls.read(CHUNK_BYTES))
        except ssl.SSLZeroReturnError:
            return b""

    async def write(self, chunk: bytes) -> None:
        """Raises OSError."""
        self._tls.write(chunk)
        await self._send()

    def close(self) -> None:
        self._writer.close()

    async def _do(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                await self._send()
                received = await self._reader.read(CHUNK_BYTES)
                if received:
                    self._received.write(received)
                else:
                    self._received.write_eof()
            finally:
                await self._send()

    async def _send(self) -> None:
        if waiting := self._to_send.read():
            self._writer.write(waiting)
        await self._writer.drain()


async def carry(read: Read, write: Write) -> None:
    """Until the end of what is read; whoever is faster waits for the other."""
    while chunk := await read():
        await write(chunk)


async def serve(listen: str, to: str, tls: ssl.SSLContext) -> None:
    """For ever."""
    host, _, port = to.rpartition(":")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller, address = Caller(reader, writer, tls), writer.get_extra_info("peername")
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await caller.shake_hands()
            answers, server = await asyncio.open_connection(host, int(port))
        except OSError as error:  # TimeoutError is one
            print(f"{address} is not let through: {error}", flush=True)
            caller.close()
            return

        async def to_server(chunk: bytes) -> None:
            server.write(chunk)
            await server.drain()

        ways = [
            asyncio.ensure_future(carry(caller.read, to_server)),
            asyncio.ensure_future(carry(lambda: answers.read(CHUNK_BYTES), caller.write)),
        ]
        # Whoever ends one way has ended the connection: NATS knows no other.
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        caller.close()
        server.close()

    at, _, on = listen.rpartition(":")
    async with await asyncio.start_server(connected, at, int(on)) as listening:
        await listening.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("listen", "to", "certificate", "key", "client-ca"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    tls = context(given.certificate, given.key, given.client_ca)
    asyncio.run(serve(given.listen, given.to, tls))


if __name__ == "__main__":
    main()
