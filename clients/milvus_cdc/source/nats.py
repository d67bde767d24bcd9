"""Reads the NATS JetStream that Milvus 2.3 to 2.5 embed (`mq.type: natsmq`).

One stream per pchannel, stream name = subject = topic; a position is the stream sequence, which
starts at 1. Laws: messages are pulled, never pushed (a push subscription drops what its client
cannot hold, and only logs it); at most about the `max_bytes` of a read is held ahead; sequences
follow one another, a hole is an error.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import nats.errors
import nats.js.errors
import structlog
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    StreamInfo,
)

from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import (
    LogLimits,
    LogRange,
    NatsConfig,
)
from milvus_cdc.source.nats_connection import (
    API_SECONDS,
    Connection,
    bounded,
    stream_info,
)
from milvus_cdc.source.nats_reader import NatsReader
from milvus_cdc.source.nats_stream import bounds, check_stream, incarnation_of
from milvus_cdc.source.positions import Numbered, decode, encode

log = structlog.get_logger()


class NatsSource(Numbered):
    """The queue of one source. A reader has a connection of its own, asking questions another."""

    def __init__(self, config: NatsConfig, secrets: SecretResolver | None = None) -> None:
        self._config = config
        self._secrets = secrets
        self._asking = Connection(config, secrets)

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> NatsReader:
        start = decode(position)
        info = await self._info(pchannel)
        check_stream(pchannel, info, start, incarnation)
        return NatsReader(self, pchannel, start, incarnation_of(info))

    async def log_range(self, pchannel: str) -> LogRange:
        info = await self._info(pchannel)
        first, end = bounds(info)
        return LogRange(encode(first), encode(end), incarnation_of(info))

    async def limits(self, pchannel: str) -> LogLimits:
        info = await self._info(pchannel)
        state, config = info.state, info.config
        first, end = bounds(info)
        # Unset and "no limit" are None, 0 or -1, depending on who made the stream.
        return LogLimits(
            LogRange(encode(first), encode(end), incarnation_of(info)),
            whole=first <= 1,
            max_age_ms=max(round((config.max_age or 0) * 1000), 0),
            max_bytes=max(config.max_bytes or 0, 0),
            max_entries=max(config.max_msgs or 0, 0),
            entry_bytes=-(-state.bytes // state.messages) if state.messages else 0,
        )

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        """The server finds it for a consumer that nobody pulls from: its `delivered` stands on the
        sequence before (nats-server `selectStartingSeqNo`, `GetSeqFromTime`).
        """
        await self._info(pchannel)
        client = await self._asking.get()
        with self._asking.errors(pchannel):
            stream = client.jetstream(timeout=API_SECONDS)
            consumer = await bounded(
                stream.add_consumer(
                    pchannel,
                    ConsumerConfig(
                        deliver_policy=DeliverPolicy.BY_START_TIME,
                        opt_start_time=datetime.fromtimestamp(max(unix_ms, 1) / 1000, UTC),
                        ack_policy=AckPolicy.NONE,
                        inactive_threshold=API_SECONDS,
                        mem_storage=True,
                    ),
                ),
                2 * API_SECONDS,
            )
            delivered = consumer.delivered
            # Only a courtesy: the server forgets idle consumers by itself.
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await bounded(stream.delete_consumer(pchannel, consumer.name), 2 * API_SECONDS)
        return encode((delivered.stream_seq if delivered else 0) + 1)

    async def probe(self) -> None:
        client = await self._asking.get()
        with self._asking.errors():
            await client.jetstream(timeout=API_SECONDS).account_info()

    async def close(self) -> None:
        await self._asking.close()

    async def connect(self) -> Connection:
        connection = Connection(self._config, self._secrets)
        await connection.get()
        return connection

    async def _info(self, pchannel: str) -> StreamInfo:
        return await stream_info(self._asking, pchannel)
