"""gRPC channels to other systems that take over certificates replaced on disk.

Law: calls that are under way end on the connection they began on. Files that cannot be used are
never taken over: while they are being replaced, one by one, the old connection serves on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
import structlog

from milvus_cdc.errors import UserError
from milvus_cdc.tls import Stamp, TlsFiles

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    channel: grpc.aio.Channel
    stamp: Stamp
    uses: int = 0


class Channels:
    """To one address: one at a time, beside those that calls under way still use."""

    def __init__(
        self, address: str, options: Sequence[tuple[str, object]], tls: TlsFiles | None
    ) -> None:
        self._address = address
        self._options = tuple(options)
        if tls is not None and tls.server_name:
            self._options += (("grpc.ssl_target_name_override", tls.server_name),)
        self._tls = tls
        self._current: _Held | None = None
        self._unusable: Stamp = ()
        """State of the files that was refused last."""
        self._old: set[_Held] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @contextmanager
    def use(self) -> Iterator[grpc.aio.Channel]:
        """For a call, or as long as a stream lasts. Raises UserError TLS_FILE_UNUSABLE."""
        held = self._newest()
        held.uses += 1
        try:
            yield held.channel
        finally:
            held.uses -= 1
            if held in self._old:
                self._let_go(held)

    async def close(self) -> None:
        held, self._current = self._current, None
        for each in (*self._old, *([held] if held is not None else [])):
            await each.channel.close()
        self._old.clear()
        await asyncio.gather(*self._closing)

    def _newest(self) -> _Held:
        before = self._current
        if before is None:
            self._current = self._open()
            return self._current
        if self._tls is None:
            return before
        stamp = self._tls.stamp()
        if stamp in (before.stamp, self._unusable):
            return before
        try:
            self._current = self._open()
        except UserError as error:
            self._unusable = stamp
            log.warning(
                "changed TLS files are not used yet", address=self._address, error=error.message
            )
            return before
        log.info("changed TLS files are used from now on", address=self._address)
        self._old.add(before)
        self._let_go(before)
        return self._current

    def _open(self) -> _Held:
        if self._tls is None:
            channel = grpc.aio.insecure_channel(self._address, options=self._options)
            return _Held(channel, ())
        credentials, stamp = self._tls.load()
        channel = grpc.aio.secure_channel(self._address, credentials, options=self._options)
        return _Held(channel, stamp)

    def _let_go(self, held: _Held) -> None:
        if held.uses:
            return
        self._old.discard(held)
        task = asyncio.create_task(_close(held.channel))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close()
